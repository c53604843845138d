"""The memory plan beside what real runs take, on a CPU.

    python benchmarks/plan.py                 # every case, each in a fresh process; about ten minutes
    python benchmarks/plan.py --cases tiny    # cases whose name begins with this

Models are built from a config with random weights and trained by ``python -m rllava_pl fit`` with a ``MemoryReport``.
On a CPU the process is what is measured: its growth since the first rollout began (resident memory at its peak in a
phase, VmHWM of Linux), plus the weights that were loaded before. Interpreter and libraries are not counted, nor are
holes in the heap (``HEAP``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library return freed memory at once; otherwise holes in its heap are measured as well."""
QUESTION = "What color is the shape?"


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    family: str = "qwen2_vl"
    width: int = 64
    """Hidden size; the MLP is four times as wide."""
    layers: int = 2
    prompts: int = 32
    group: int = 8
    max_tokens: int = 64
    options: dict[str, str] = field(default_factory=dict)
    """Further options of ``fit``."""


CHECKPOINTED = {"model.policy.gradient_checkpointing": "true"}
CASES = [
    Case("tiny qwen2_vl"),
    Case("tiny qwen2_vl, checkpointed", options=CHECKPOINTED),
    Case("tiny qwen2_vl, 4 micro-batches", options={"model.batching.micro_batch_size": "64"}),
    Case("tiny qwen3_vl", family="qwen3_vl"),
    Case("tiny qwen2_5_vl", family="qwen2_5_vl"),
    Case("tiny idefics3", family="idefics3"),
    Case("tiny llava", family="llava"),
    Case("20M qwen2_vl", width=512, layers=6, prompts=8),
    Case("20M qwen2_vl, checkpointed", width=512, layers=6, prompts=8, options=CHECKPOINTED),
    Case(
        "20M qwen2_vl, LoRA",
        width=512,
        layers=6,
        prompts=8,
        options={"model.policy.lora.r": "16", "model.policy.lora.alpha": "32"},
    ),
    Case(
        "20M qwen2_vl, HostAdamW",
        width=512,
        layers=6,
        prompts=8,
        options={"model.optimizer": "HostAdamW", "model.optimizer.lr": "1e-4"},
    ),
    Case(
        "0.3B qwen2_vl, bf16",
        width=1024,
        layers=18,
        prompts=1,
        max_tokens=24,
        options={"model.policy.dtype": "bfloat16"},
    ),
]


def enlarge(directory: Path, case: Case) -> None:
    """A model of the case's size with random weights, in place of the tiny one of the same family."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from rllava_pl.models import tiny

    tiny.build(directory, family=case.family, questions=[QUESTION], answers=["red", "blue"], warmup_steps=0)
    if case.width == 64:
        return
    config = AutoConfig.from_pretrained(directory)
    text, heads = config.text_config, case.width // 64
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = case.width, 4 * case.width, case.layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = heads, heads // 2, 64
    text.layer_types = ["full_attention"] * case.layers
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    config.vision_config.hidden_size = case.width  # of the merger's output, in Qwen2-VL
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


def run(case: Case, directory: Path) -> dict[str, dict[str, float]]:
    """Predicted and measured GiB by phase, of a run of two rollouts in this process."""
    from rllava_pl.callbacks import MemoryReport
    from rllava_pl.cli import main

    options = {
        "config": "tiny/colour",
        "model.policy": "VLM",
        "model.policy.path": str(directory / "model"),
        "model.group_size": str(case.group),
        "model.sampling.max_tokens": str(case.max_tokens),
        "model.batching.num_minibatches": "1",
        "model.max_rollouts": "2",
        "model.kl.loss_coef": "0.0",
        "model.schedule.kind": "constant",
        "data.batch_size": str(case.prompts),
        "trainer.callbacks": "MemoryReport",
        "trainer.logger": "false",
        "trainer.limit_val_batches": "0",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": str(directory),
        **case.options,
    }
    cli = main(["fit", *(f"--{key}={value}" for key, value in options.items())])
    report = next(x for x in cli.trainer.callbacks if isinstance(x, MemoryReport))
    return {"predicted": report.predicted, "measured": report.measured}


def measure(case: Case) -> dict[str, dict[str, float]]:
    """The same in fresh processes: one makes the model, the next trains it."""
    with tempfile.TemporaryDirectory() as folder:
        for step in ("make", "run"):
            process = subprocess.run(
                [sys.executable, __file__, "--step", step, "--folder", folder, "--case", json.dumps(asdict(case))],
                capture_output=True,
                text=True,
                env={"OMP_NUM_THREADS": "1", **HEAP, **os.environ},
            )
            if process.returncode:
                raise RuntimeError(f"{case.name}: {process.stderr[-2000:]}")
    result: dict[str, dict[str, float]] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Every case, one row a phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="run the cases whose names begin with this; all by default")
    parser.add_argument("--step", choices=("make", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        return enlarge(options.folder / "model", options.case)
    if options.step == "run":
        return print(json.dumps(run(options.case, options.folder)))
    print("| run | phase | predicted MiB | measured MiB | predicted / measured |\n|---|---|---|---|---|")
    for case in (case for case in CASES if case.name.startswith(options.cases)):
        result = measure(case)
        for phase in ("rollout", "update"):
            predicted, measured = (1024 * result[kind][phase] for kind in ("predicted", "measured"))
            print(
                f"| {case.name} | {phase} | {predicted:.0f} | {measured:.0f} | {predicted / measured:.3f} |", flush=True
            )
    return None


if __name__ == "__main__":
    main()
