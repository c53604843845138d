"""How fast engines sample, and how fast weights reach vLLM, in one process and interleaved.

    python benchmarks/rollout_speed.py --turns 10

Needs vLLM (``make test-vllm`` makes an environment with it in .venv-vllm). Three competitors take turns on the same
prompts of the colour task, with one policy and the same budget: vLLM; the embedded engine, which reads a prompt once a
group; and the ``generate`` of transformers, one row a sample, without log-probs. The second table compares a sync (all
weights through vLLM's weight-transfer API, packing for its kernels included) with a copy of the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir

import torch

from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.functional.seeds import seed_from
from rllava_pl.models import TinyVLM
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import hf_weights
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.transformers import TransformersEngine
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_build import build_llm, context_of
from rllava_pl.types import Request, Sampling

Sampled = Callable[[Sequence[Request], Sampling], int]
"""Completes the requests and returns the number of tokens sampled."""


def engine_tokens(engine: VLLMEngine | TransformersEngine) -> Sampled:
    """An engine of this package as a competitor."""

    def sampled(requests: Sequence[Request], sampling: Sampling) -> int:
        return sum(len(r.response_ids) for r in run_episodes(engine, engine.policy, requests, sampling))

    return sampled


def plain_tokens(policy: Policy) -> Sampled:
    """The model's own ``generate`` on one batch of P x G rows, prompts repeated, with its own sampling."""

    @torch.no_grad()
    def sampled(requests: Sequence[Request], sampling: Sampling) -> int:
        inputs = policy.collate([request.inputs for request in requests for _ in request.seeds])
        del inputs["position_ids"]
        ids = policy.model.generate(
            **inputs,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=policy.stop_ids,
            pad_token_id=policy.pad_id,
        )[:, inputs["input_ids"].shape[1] :]
        ended_NT = torch.isin(ids, torch.tensor(policy.stop_ids)).cumsum(1)
        return int(((ended_NT == 0) | ((ended_NT == 1) & torch.isin(ids, torch.tensor(policy.stop_ids)))).sum())

    return sampled


def clocked(run: Callable[[], int]) -> tuple[float, float, int]:
    """Wall and CPU seconds of a call, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def requests(policy: Policy, prompts: int, group: int, turn: int) -> list[Request]:
    """The next prompts of the task, with seeds of this turn."""
    rows = DrawnPrompts("color", "train", prompts * (turn + 1))[prompts * turn :]
    inputs = policy.encode(rows)
    seeds = [tuple(seed_from("speed", turn, p, g) for g in range(group)) for p in range(prompts)]
    return [Request(q, x, p, seeds[p]) for p, (q, x) in enumerate(zip(rows, inputs, strict=True))]


def rollouts(competitors: dict[str, Sampled], policy: Policy, args: argparse.Namespace) -> None:
    """Time the competitors and print the table."""
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in competitors}
    for turn in range(-1, args.turns):  # the first turn is a warm-up and not counted
        asked = requests(policy, args.prompts, args.group_size, turn + 1)
        for name, sampled in competitors.items():
            figures = clocked(lambda sampled=sampled, asked=asked: sampled(asked, Sampling(max_tokens=args.max_tokens)))
            if turn >= 0:
                rows[name].append(figures)
    print(f"\n{args.prompts} prompts x {args.group_size} samples, at most {args.max_tokens} tokens; {args.turns} turns")
    print("| engine | wall ms, median (min - max) | CPU ms, median | tokens a second (wall) |\n|---|---|---|---|")
    for name, figures in rows.items():
        wall, cpu, tokens = ([row[k] for row in figures] for k in range(3))
        speed = statistics.median(n / s for n, s in zip(tokens, wall, strict=True))
        span = f"{1e3 * statistics.median(wall):.0f} ({1e3 * min(wall):.0f} - {1e3 * max(wall):.0f})"
        print(f"| {name} | {span} | {1e3 * statistics.median(cpu):.0f} | {speed:,.0f} |")


def syncs(engine: VLLMEngine, policy: Policy, turns: int) -> None:
    """Time a sync and a copy of the same tensors and print the table."""
    weights = [(name, tensor.clone()) for name, tensor in hf_weights(policy.model)]
    total, targets = sum(x.nbytes for _, x in weights), [torch.empty_like(x) for _, x in weights]

    def copy() -> int:
        for target, (_, source) in zip(targets, weights, strict=True):
            target.copy_(source)
        return total

    def sync() -> int:
        engine.sync(iter(weights), engine.version + 1)
        return total

    timed: dict[str, list[float]] = {"sync to vLLM": [], "plain copy, tensor by tensor": []}
    for _ in range(turns + 1):
        for name, run in zip(timed, (sync, copy), strict=True):
            timed[name].append(clocked(run)[0])
    print(f"\nweights: {len(weights)} tensors, {total / 1e6:.2f} MB; {turns} turns")
    print("| what | ms, median (min - max) | MB a second |\n|---|---|---|")
    for name, seconds in timed.items():
        kept = seconds[1:]
        span = f"{1e3 * statistics.median(kept):.2f} ({1e3 * min(kept):.2f} - {1e3 * max(kept):.2f})"
        print(f"| {name} | {span} | {total / 1e6 / statistics.median(kept):,.0f} |")


def main() -> None:
    """Build everything once and run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="idefics3")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=8)
    args = parser.parse_args()
    task = TASKS["color"]
    policy = TinyVLM(
        args.family,
        questions=[task.question],
        answers=list(task.answers),
        cache_dir=str(Path(gettempdir()) / "rllava_pl-benchmarks"),
    )
    policy.prepare(1)
    policy.load()
    llm = build_llm(
        policy.path,
        dtype="float32",
        context_tokens=context_of(policy.path, 4096),
        images=1,
        kv_cache_gib=0.25,
        memory="resident",
        enforce_eager=True,
        seed=1,
    )
    engine = VLLMEngine(llm, policy)
    engine.sync(hf_weights(policy.model), 0)
    competitors = {
        "vLLM": engine_tokens(engine),
        "embedded": engine_tokens(TransformersEngine(policy)),
        "plain `generate`": plain_tokens(policy),
    }
    rollouts(competitors, policy, args)
    syncs(engine, policy, 5 * args.turns)
    engine.close()


if __name__ == "__main__":
    main()
