"""Log-probs over a large vocabulary, forward and backward: tiles of the vocabulary beside full logits and TRL.

    python benchmarks/logprobs.py --threads 2 --turns 7

For each width of the hidden states, V = 151,936 tokens and 2,048 rows in fp32, with a random upstream gradient. Every
measurement is a new process, which warms up on a small vocabulary; the methods alternate. Memory is the rise of the
process's peak above inputs and weight; a trained head's gradient is part of it.

Methods: ``full`` is log_softmax and gather, without entropies; ``full, entropy`` is ``token_log_probs``; ``tiles`` is
``chunked_token_log_probs``, ``tiles, logp`` the same without entropies; ``trl`` is the fused head of TRL (extra
`bench`) with entropies, as in its GRPO trainer. ``frozen`` means that the head takes no gradient. On a busy machine
read the CPU time, with one thread; on an idle one the wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from _fresh import forget_peak, fresh, peak
from torch import Tensor

from rllava_pl.functional.logprobs import chunked_token_log_probs, token_log_probs

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-probs (M,) from hidden states (M, H), the head's weight (V, H) and ids (M,)."""
FROZEN = " frozen"


def full(hidden_MH: Tensor, weight_VH: Tensor, ids_M: Tensor) -> Tensor:
    """The textbook form."""
    return (hidden_MH @ weight_VH.T).log_softmax(-1).gather(1, ids_M[:, None])[:, 0]


def full_with_entropy(hidden_MH: Tensor, weight_VH: Tensor, ids_M: Tensor) -> Tensor:
    """This package's function of logits."""
    return token_log_probs((hidden_MH @ weight_VH.T)[None], ids_M[None])[0][0]


def tiles(hidden_MH: Tensor, weight_VH: Tensor, ids_M: Tensor) -> Tensor:
    """This package's function of hidden states, entropies included."""
    return chunked_token_log_probs(hidden_MH[None], weight_VH, ids_M[None])[0][0]


def tiles_without_entropy(hidden_MH: Tensor, weight_VH: Tensor, ids_M: Tensor) -> Tensor:
    """This package's function of hidden states, log-probs only."""
    return chunked_token_log_probs(hidden_MH[None], weight_VH, ids_M[None], entropy=False)[0][0]


def trl(hidden_MH: Tensor, weight_VH: Tensor, ids_M: Tensor) -> Tensor:
    """The head of TRL's GRPO trainer, with its tile size."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    size = _CHUNKED_LOGPROB_CHUNK_SIZE
    return ChunkedLogProbFunction.apply(hidden_MH, weight_VH, None, ids_M, 1.0, size, None, 1.0, ("entropy",))[0]


METHODS: dict[str, Method] = {
    "full": full,
    "full, entropy": full_with_entropy,
    "tiles": tiles,
    "tiles, logp": tiles_without_entropy,
    "trl": trl,
}
CASES = [*METHODS, *(name + FROZEN for name in ("full", "tiles", "trl"))]


def measure(case: str, *, width: int, vocabulary: int, rows: int) -> dict[str, float]:
    """Seconds of one forward and backward, and the rise of peak memory in MB; for a fresh process."""
    method, frozen = METHODS[case.removesuffix(FROZEN)], case.endswith(FROZEN)
    _forward_backward(method, *_inputs(width, 4096, 64, frozen))
    inputs = _inputs(width, vocabulary, rows, frozen)
    before = forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    _forward_backward(method, *inputs)
    clocks = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return clocks | {"megabytes": (peak() - before) / 1e6}


def _inputs(width: int, vocabulary: int, rows: int, frozen: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(rows, width).normal_(generator=generator).requires_grad_()
    weight = torch.empty(vocabulary, width).normal_(std=0.02, generator=generator).requires_grad_(not frozen)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, ids, torch.randn(rows, generator=generator)


def _forward_backward(method: Method, hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor) -> None:
    method(hidden, weight, ids).backward(upstream)


def take_turns(options: argparse.Namespace, width: int) -> dict[str, list[dict[str, float]]]:
    """All measurements of one width."""
    found: dict[str, list[dict[str, float]]] = {case: [] for case in options.cases}
    sizes = {"width": width, "vocabulary": options.vocabulary, "rows": options.rows}
    for turn in range(options.turns):
        first = turn % len(options.cases)
        for case in (*options.cases[first:], *options.cases[:first]):
            found[case].append(fresh(measure, case, **sizes))
    return found


def table(found: dict[str, list[dict[str, float]]], width: int) -> str:
    """Medians of each clock with minimum and maximum, and relative to full logits with a trained head."""
    columns = f"{'median':>9}{'min':>7}{'max':>7}{'/ full':>8}"
    lines = [f"H = {width:<14}{'':8}{'wall seconds':>31}{'CPU seconds':>31}", f"{'':18}{'MB':>8}{columns}{columns}"]
    for case, results in found.items():
        row = f"{case:18}{median(x['megabytes'] for x in results):>8.0f}"
        for clock in ("seconds", "cpu_seconds"):
            times = [result[clock] for result in results]
            row += f"{median(times):>9.2f}{min(times):>7.2f}{max(times):>7.2f}"
            row += f"{median(times) / median(x[clock] for x in found['full']):>8.2f}" if "full" in found else ""
        lines.append(row)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one table per width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024], help="of the hidden states")
    parser.add_argument("--rows", type=int, default=2048, help="response tokens (default 2048)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="default 151936, that of Qwen")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--threads", type=int, default=2, help="of torch's operators (default 2)")
    parser.add_argument("--turns", type=int, default=7, help="measurements of each (default 7)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if any(case.startswith("trl") for case in options.cases):
        import trl.trainer.utils  # noqa: F401 - here, not in every process
    print(f"{options.rows} rows, V = {options.vocabulary}, fp32, {options.threads} threads, {options.turns} turns")
    for width in options.widths:
        print(table(take_turns(options, width), width), flush=True)


if __name__ == "__main__":
    main()
