"""What a process of its own costs a reward, in time, and what faults cost a run.

Each batch is scored in turn by the same reward in this process and in a pool, and once in so many batches a fault is
put in::

    python benchmarks/reward_pool.py
    python benchmarks/reward_pool.py --samples 256 --tokens 512 --workers 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from _rewards import Hanging, Tags

from rllava_pl.rewards import Judgement, Judging, Panel, judge
from rllava_pl.types import Message, Prompt, PromptInputs, Rollout

TURNS = 15


def rollouts(samples: int, tokens: int) -> list[Rollout]:
    """Responses of four characters a token, with an answer at their end."""
    prompt = Prompt("row:0", (Message("user", ("Which digit is it?",)),), answer="4")
    ids, inputs = torch.arange(tokens), PromptInputs(torch.arange(300))
    mask, logp = torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens)
    text = ("so " * (tokens * 4 // 3))[: max(0, tokens * 4 - 18)]
    return [
        Rollout(prompt, 0, inputs.input_ids_S, inputs, ids, logp, mask, "stop", 0, f"{text}{k} <answer>4</answer>")
        for k in range(samples)
    ]


def timed(score: Callable[[Sequence[Rollout]], Judgement], batch: Sequence[Rollout]) -> tuple[float, Judgement]:
    """Wall seconds, and what was said."""
    start = time.perf_counter()
    judgement = score(batch)
    return time.perf_counter() - start, judgement


def overhead(samples: int, tokens: int, workers: int) -> None:
    """Microseconds a sample, here and there, in turn."""
    batch, here = rollouts(samples, tokens), [Tags(lenient=True)]
    start = time.perf_counter()
    panel = Panel([Tags(lenient=True)], Judging(isolation="process", workers=workers))
    ours = time.perf_counter() - start
    first, judgement = timed(panel, batch[:1])
    assert judgement.rewards == judge(here, batch[:1]).rewards
    times: dict[str, list[float]] = {"in the trainer": [], "in processes": []}
    for _ in range(TURNS):
        for name, score in (("in the trainer", lambda batch: judge(here, batch)), ("in processes", panel)):
            times[name].append(timed(score, batch)[0] / samples * 1e6)
    panel.close()
    told = ", ".join(f"{name} {statistics.median(x):.0f} (min {min(x):.0f})" for name, x in times.items())
    print(f"{samples} samples of {tokens} tokens, {workers} workers; us a sample, median: {told}")
    print(f"  start: {1e3 * ours:.0f} ms in the trainer, first score after {first:.1f} s more")


def fault(samples: int, tokens: int, workers: int) -> None:
    """A batch with one hanging sample, and the next batch, in which its worker has been replaced."""
    batch = rollouts(samples, tokens)
    panel = Panel([Hanging()], Judging(isolation="process", workers=workers, timeout_seconds=1.0))
    panel(batch)
    usual = statistics.median(timed(panel, batch)[0] for _ in range(TURNS))
    stuck = Rollout(**{**vars(batch[0]), "text": "hang"})
    slow, judgement = timed(panel, [stuck, *batch[1:]])
    after = timed(panel, batch)[0]
    panel.close()
    assert judgement.causes == {"timeout": 1}
    print(f"  a hang, timeout 1 s: {slow - usual:.2f} s more than usual, the next batch {1e3 * (after - usual):.0f} ms")


def main() -> None:
    """Print both for one or several sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 512, 4096])
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    for tokens in args.tokens:
        overhead(args.samples, tokens, args.workers)
    fault(args.samples, args.tokens[0], args.workers)


if __name__ == "__main__":
    main()
