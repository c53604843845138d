"""Forward and backward of log-probs by layout of the batch: time and memory, with and without checkpointing.

    python benchmarks/shared_prompt.py --turns 5

Forms: ``plain`` computes a prompt once a completion; ``padded`` computes it once a group, all prompts and all responses
padded to the longest; ``packed`` is the form of the policy, one row without padding. A random idefics3 in fp32, one
image a prompt, groups of 8, lengths uniform in the ranges of the case, one thread. Every measurement is a new process,
which warms up once; the forms alternate. Memory is the rise of the process's peak above its value before the first
forward.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from _fresh import forget_peak, fresh, peak

from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.models import tiny
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy
from rllava_pl.types import PolicyBatch

GROUP = 8
FORMS = ("plain", "padded", "packed")


@dataclass(frozen=True)
class Case:
    """Prompts with ragged texts and their ragged responses."""

    prompts: int
    prompt_tokens: tuple[int, int]
    response_tokens: tuple[int, int]
    width: int = 256
    layers: int = 4


CASES = {
    "a": Case(16, (21, 21), (3, 8), width=64, layers=2),
    "b": Case(2, (128, 256), (16, 64)),
    "c": Case(1, (256, 256), (64, 512)),
    "d": Case(1, (1024, 1024), (16, 128)),
    "e": Case(4, (128, 512), (16, 256)),
}


def build(folder: Path, case: Case, *, checkpointing: bool, share_prompt: bool) -> Policy:
    """A random policy of the case's size, with the processor of the tiny model."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(folder)
    sizes = {"hidden_size": case.width, "intermediate_size": 3 * case.width, "num_hidden_layers": case.layers}
    heads = {"num_attention_heads": case.width // 64 or 1, "num_key_value_heads": max(1, case.width // 128)}
    for name, value in {**sizes, **heads, "head_dim": 64, "max_position_embeddings": 4096}.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model, AutoProcessor.from_pretrained(folder), share_prompt=share_prompt).train(checkpointing)


def batch_of(policy: Policy, case: Case, *, padded: bool) -> PolicyBatch:
    """Random text behind real prompts of one image; ``padded``: all padded to the longest."""
    generator = torch.Generator().manual_seed(1)

    def lengths(bounds: tuple[int, int], count: int) -> list[int]:
        drawn = torch.randint(bounds[0], bounds[1] + 1, (count,), generator=generator).tolist()
        return [bounds[1] if padded or k == 0 else length for k, length in enumerate(drawn)]

    words, inputs = (20, 100), []
    prompts = DrawnPrompts("color", split="train", size=case.prompts)
    for x, wanted in zip(policy.encode(list(prompts)), lengths(case.prompt_tokens, case.prompts), strict=True):
        text = torch.randint(*words, (max(0, wanted - len(x)),), generator=generator)
        inputs.append(extend(x, text.tolist()))
    rows, width = case.prompts * GROUP, case.response_tokens[1]
    mask_NT = torch.arange(width) < torch.tensor(lengths(case.response_tokens, rows))[:, None]
    ids_NT = torch.randint(*words, (rows, width), generator=generator)
    return PolicyBatch(tuple(inputs), GROUP, ids_NT, mask_NT)


def measure(folder: Path, name: str, form: str, *, checkpointing: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of one forward and backward, and the rise of peak memory in MB; for a fresh process."""
    case = CASES[name]
    policy = build(folder, case, checkpointing=checkpointing, share_prompt=form != "plain")
    batch = batch_of(policy, case, padded=form == "padded")
    upstream = torch.randn(batch.mask_NT.shape, generator=torch.Generator().manual_seed(2))
    before, wall, cpu = forget_peak(), [], []
    for _ in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        (policy(batch).logp_NT * upstream).sum().backward()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        policy.zero_grad()
    return {"ms": 1e3 * median(wall[1:]), "cpu_ms": 1e3 * median(cpu[1:]), "megabytes": (peak() - before) / 1e6}


def take_turns(folder: Path, name: str, options: argparse.Namespace, *, checkpointing: bool) -> str:
    """One line of the table."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in options.forms}
    for turn in range(options.turns):
        first = turn % len(options.forms)
        for form in (*options.forms[first:], *options.forms[:first]):
            found[form].append(fresh(measure, folder, name, form, checkpointing=checkpointing, repeats=options.repeats))
    cells = [
        " / ".join(f"{median(x[key] for x in results):.0f}" for key in ("ms", "cpu_ms", "megabytes"))
        for results in found.values()
    ]
    return f"{name + (' checkpointed' if checkpointing else ''):16}" + "".join(f"{cell:>22}" for cell in cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--turns", type=int, default=3, help="processes of each form (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="passes of a process, behind one to warm up (default 3)")
    parser.add_argument("--folder", type=Path, help="keep the tiny model here (default: a temporary directory)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "tiny"
        task = TASKS["color"]
        tiny.build(folder, family="idefics3", questions=[task.question], answers=list(task.answers), warmup_steps=0)
        print(f"{'':16}" + "".join(f"{form + ', ms / CPU / MB':>22}" for form in options.forms))
        for name in options.cases:
            for checkpointing in (False, True):
                print(take_turns(folder, name, options, checkpointing=checkpointing), flush=True)


if __name__ == "__main__":
    main()
