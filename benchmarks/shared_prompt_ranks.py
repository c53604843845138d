"""Computing a prompt once a group or once a completion, under every strategy: seconds and memory of an update.

    python benchmarks/shared_prompt_ranks.py --strategies rl_ddp rl_deepspeed_3 --turns 3

Two CPU processes over gloo; model, measurement and processes are those of ``strategies.py``. A rank has two prompts of
about 150 tokens with an image, and eight completions of sixteen tokens of each. The forms alternate. Of all passes but
the first, the least seconds of the slower rank and the largest extra peak count.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from strategies import NAMES, build, finish, fit, launch, read, reset_peak

from rllava_pl.datamodules import BaseDataModule
from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.distributed.collectives import rank
from rllava_pl.models import VLM
from rllava_pl.types import IMAGE, Message

REPEATS = 16
"""Of the question in a prompt."""
FORMS = ("repeated", "shared", "repeated_checkpointed", "shared_checkpointed")


class LongPrompts(BaseDataModule):
    """Images with their question repeated."""

    def setup(self, stage: str) -> None:
        """Sixteen prompts."""
        question = Message("user", (IMAGE, " ".join([TASKS["color"].question] * REPEATS)))
        drawn = DrawnPrompts("color", "train", 16)
        self.train_prompts = [dataclasses.replace(prompt, messages=(question,)) for prompt in drawn]


class Update(Callback):
    """Least seconds of an update, and its largest extra peak in MiB; the first pass does not count."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {"seconds": float("inf"), "peak": 0.0}
        self.passes = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the phases."""
        pl_module.phases.observers.append(self)

    def phase_begins(self, name: str) -> None:
        """Start to measure an update."""
        if name == "update":
            self.before = reset_peak()

    def phase_ends(self, name: str, seconds: float) -> None:
        """Record the update."""
        if name == "update":
            self.passes += 1
            if self.passes > 1:
                self.facts["seconds"] = min(self.facts["seconds"], seconds)
                self.facts["peak"] = max(self.facts["peak"], read("VmHWM") - self.before)


def work(task: str, checkpoint: str, output: Path) -> None:
    """One rank of ``strategy:form``."""
    torch.set_num_threads(1)
    name, form = task.split(":")
    vlm = VLM(checkpoint, share_prompt=form.startswith("shared"), gradient_checkpointing="checkpointed" in form)
    update = Update()
    fit(name, vlm, LongPrompts(batch_size=2), update, group=8, tokens=16)
    finish(update.facts, output / f"{task}-{rank()}.json")


def row(name: str, found: dict[str, list[dict[str, float]]]) -> str:
    """Of the table: both forms and their ratio, without and with checkpointing."""
    seconds = {form: min(facts["seconds"] for facts in turns) for form, turns in found.items()}
    peaks = {form: max(facts["peak"] for facts in turns) for form, turns in found.items()}
    cells = [name]
    for plain, shared in (FORMS[:2], FORMS[2:]):
        cells.append(f"{seconds[plain]:.2f} / {seconds[shared]:.2f} ({seconds[shared] / seconds[plain]:.2f})")
        cells.append(f"{peaks[plain]:.0f} / {peaks[shared]:.0f}")
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table with a row for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker[0], options.worker[1], Path(options.worker[2]))
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        build(checkpoint, options.width, options.layers, "float32")
        print("| strategy | s, repeated / shared | MiB | s, checkpointed | MiB |\n|---|---|---|---|---|")
        for name in options.strategies:
            found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
            for _ in range(options.turns):
                for form in FORMS:
                    ranks = launch(__file__, f"{name}:{form}", checkpoint, Path(directory))
                    found[form].append({key: max(facts[key] for facts in ranks) for key in ranks[0]})
            print(row(name, found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
