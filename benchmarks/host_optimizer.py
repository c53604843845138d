"""The host optimizer's step beside the bandwidth of the machine's memory and beside torch's fused AdamW.

    python benchmarks/host_optimizer.py                      # 64 million parameters, one thread
    python benchmarks/host_optimizer.py --threads 8 --parameters 200
    python benchmarks/host_optimizer.py --clock cpu          # on a shared machine

A step is clipping (the norm over all gradients, always above the limit) and AdamW. The bound is the time in which
``a += b`` over large arrays moves the bytes that a step must move: every gradient read twice, every moment and weight
read and written once. Each optimizer alternates with that addition and is compared with its own measurements of it.
``sum`` is the cost of a micro-batch: a bf16 gradient of every parameter added to the fp32 sums.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim import AdamW

from rllava_pl.optim import HostAdamW

WIDTH = 2**20
"""Parameters of a tensor."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Candidate:
    """One way to take a step."""

    name: str
    bytes_a_parameter: float
    """Bytes that a step must move."""
    run: Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and, if asked for, write a JSON file."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options.parameters * 1_000_000 // WIDTH or 1, options.rounds, CLOCKS[options.clock])
    print(table(rows, options))
    if options.output:
        report = {"options": vars(options), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def measure(tensors: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, float | str]]:
    """Median ns a parameter of every candidate, and the fraction of the memory bandwidth that it reaches."""
    addition = stream(tensors)
    rows = []
    for make in CANDIDATES:
        candidate = make(tensors)
        own, reference = [], []
        for _ in range(rounds + 1):
            reference.append(timed(addition.run, clock))
            own.append(timed(candidate.run, clock))
        ns, bound = (
            1e9 * median(times[1:]) / (tensors * WIDTH) for times in (own, reference)
        )  # the first one is a warm-up
        size, speed = candidate.bytes_a_parameter, candidate.bytes_a_parameter / ns
        of_bound = speed / (addition.bytes_a_parameter / bound)
        row = {"bytes_a_parameter": size, "ns_a_parameter": ns, "gb_a_second": speed, "of_bound": of_bound}
        rows.append({"name": candidate.name, **row})
    return rows


def timed(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    run()
    return clock() - start


def stream(tensors: int) -> Candidate:
    """Two numbers read and one written, over arrays far larger than the caches."""
    a, b = torch.zeros(tensors * WIDTH), torch.ones(tensors * WIDTH)
    return Candidate("a += b", 12, lambda: a.add_(b))


def weights(tensors: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Small random numbers."""
    return [nn.Parameter(torch.randn(WIDTH // 1024, 1024).mul_(0.02).to(dtype)) for _ in range(tensors)]


def torch_adamw(tensors: int) -> Candidate:
    """``clip_grad_norm_`` reads and, when it clips, writes the gradients once more than needed."""
    parameters = weights(tensors, torch.float32)
    optimizer = AdamW(parameters, lr=1e-6, fused=True)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    return Candidate("torch AdamW, fp32 weights", 4 + 4 + 8 + 8 + 8, run)


def ours(name: str, bytes_a_parameter: float, dtype: torch.dtype, tensors: int, **options: str) -> Candidate:
    """HostAdamW; the gradients are kept for the next round."""
    parameters = weights(tensors, dtype)
    optimizer = HostAdamW(parameters, lr=1e-6, **options)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)

    def run() -> None:
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()

    return Candidate(name, bytes_a_parameter, run)


def sums(tensors: int) -> Candidate:
    """A micro-batch's gradients, one tensor after the other as in backward."""
    parameters = weights(tensors, torch.bfloat16)
    optimizer = HostAdamW(parameters, lr=1e-6)
    gradient = torch.full_like(parameters[0], 1e-3)

    def run() -> None:
        for p in parameters:
            p.grad = gradient
            optimizer._gradients.take(p)

    run()
    return Candidate("sum", 2 + 8, run)


CANDIDATES: list[Callable[[int], Candidate]] = [
    stream,
    torch_adamw,
    partial(ours, "float32, fp32 weights", 4 + 4 + 8 + 8 + 8, torch.float32),
    partial(ours, "float32", 4 + 4 + 8 + 8 + 8 + 2, torch.bfloat16),
    partial(ours, "float32, bf16 sums", 2 + 2 + 8 + 8 + 8 + 2, torch.bfloat16, gradients="bfloat16"),
    partial(ours, "bfloat16", 4 + 4 + 4 + 4 + 8 + 2, torch.bfloat16, states="bfloat16"),
    partial(ours, "int8", 4 + 4 + 2 + 2 + 4 + 4 * 4 / 256, torch.bfloat16, states="int8"),
    sums,
]
"""With bf16 weights unless named otherwise; bytes of gradients, first and second moment, master weights and weights."""


def table(rows: list[dict[str, float | str]], options: argparse.Namespace) -> str:
    """The rows as text."""
    lines = [f"{'a parameter':27}{'B':>7}{'ns':>8}{'GB/s':>8}{'of bound':>10}"]
    for row in rows:
        numbers = f"{row['bytes_a_parameter']:>7.2f}{row['ns_a_parameter']:>8.2f}{row['gb_a_second']:>8.1f}"
        lines.append(f"{row['name']:27}{numbers}{row['of_bound']:>10.2f}")
    return "\n".join([*lines, f"{options.threads} thread(s), {options.clock} time"])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=64, help="millions of them (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="of torch's operators (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each candidate (default 9)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is measured (default wall)")
    parser.add_argument("--output", default="", help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
