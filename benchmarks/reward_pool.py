"""What worker processes cost a reward in time, and what a fault costs a run.

The same reward scores each batch in this process and in worker processes, in turn; then a batch with a sample that
hangs is measured::

    python benchmarks/reward_pool.py
    python benchmarks/reward_pool.py --samples 256 --tokens 512 --workers 4
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from _rewards import Hanging, Tags

from rllava_pl.rewards import RewardOutput, RewardRunner, Scoring, compute_rewards
from rllava_pl.types import Message, Prompt, PromptInputs, Reward, Rollout, Segment

TURNS = 15


def rollouts(samples: int, tokens: int) -> list[Rollout]:
    """Responses of four characters per token, with an answer at their end."""
    prompt = Prompt("row:0", (Message("user", ("Which digit is it?",)),), answer="4")
    inputs = PromptInputs(torch.arange(300))
    segment = Segment(torch.arange(tokens), logprobs_T=torch.zeros(tokens), weight_version=0)
    text = ("so " * (tokens * 4 // 3))[: max(0, tokens * 4 - 18)]
    return [
        Rollout(prompt, 0, inputs, (dataclasses.replace(segment),), text=f"{text}{k} <answer>4</answer>")
        for k in range(samples)
    ]


def timed(score: Callable[[Sequence[Rollout]], RewardOutput], batch: Sequence[Rollout]) -> tuple[float, RewardOutput]:
    """Wall seconds, and the rewards."""
    start = time.perf_counter()
    output = score(batch)
    return time.perf_counter() - start, output


def started(reward: Reward, scoring: Scoring) -> RewardRunner:
    """A runner whose processes have begun to start."""
    runner = RewardRunner([reward], scoring)
    runner.start()
    return runner


def overhead(samples: int, tokens: int, workers: int) -> None:
    """Microseconds per sample in both places, in turn."""
    batch, reward = rollouts(samples, tokens), Tags(lenient=True)
    start = time.perf_counter()
    runner = started(reward, Scoring(isolation="process", workers=workers))
    in_trainer = time.perf_counter() - start
    first, output = timed(runner, batch[:1])
    assert output.rewards == compute_rewards([reward], batch[:1]).rewards
    scorers = {"in the trainer": RewardRunner([reward], Scoring()), "in processes": runner}
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(TURNS):
        for name, scorer in scorers.items():
            times[name].append(timed(scorer, batch)[0] / samples * 1e6)
    runner.close()
    shown = ", ".join(f"{name} {statistics.median(x):.0f} (min {min(x):.0f})" for name, x in times.items())
    print(f"{samples} samples of {tokens} tokens, {workers} workers; us per sample, median: {shown}")
    print(f"  start: {1e3 * in_trainer:.0f} ms in the trainer, first score after {first:.1f} s more")


def fault(samples: int, tokens: int, workers: int) -> None:
    """A batch with one hanging sample, and the next batch, in which its worker has been replaced."""
    batch = rollouts(samples, tokens)
    runner = started(Hanging(), Scoring(isolation="process", workers=workers, timeout_seconds=1.0))
    runner(batch)
    usual = statistics.median(timed(runner, batch)[0] for _ in range(TURNS))
    slow, output = timed(runner, [dataclasses.replace(batch[0], text="hang"), *batch[1:]])
    after = timed(runner, batch)[0]
    runner.close()
    assert output.causes == {"timeout": 1}
    print(f"  a hang, timeout 1 s: {slow - usual:.2f} s more than usual, the next batch {1e3 * (after - usual):.0f} ms")


def main() -> None:
    """Print the overhead for every length, and the cost of a fault."""
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
