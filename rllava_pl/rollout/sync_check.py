"""After a sync: a few fixed prompts that engine and trainer both score, to stop a run in which the two differ.

The engine samples the probes, the trainer scores the sampled tokens, and the log-probs must agree. Weights that did not
arrive (vision tower, head, one adapter) and answers from caches of old weights all show as a gap. The images are drawn
here, and the longest prompt is longer than a block of vLLM's prefix cache, so that a stale block is read if there is
one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence

from rllava_pl.distributed.collectives import max_over_ranks
from rllava_pl.functional.seeds import seed_from
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.common import BatchEngine
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.types import IMAGE, Message, PolicyBatch, Prompt, Request, Sampling

log = logging.getLogger(__name__)

BLOCK_TOKENS = 128
"""A block of vLLM's prefix cache on a CPU; 16 on GPUs. Only whole blocks are ever reused."""
RESPONSE_TOKENS = 8
SAMPLES = 4
SIDE_PIXELS = 56
TEXT, LONG_TEXT, IMAGE_PROBE, LONG = "a text", "a long text", "an image", "images and a long text"
"""The probes."""


@dataclass(frozen=True)
class GapLimit:
    """How far the log-probs of engine and trainer may differ, in nats."""

    largest: float
    """Of one token."""
    mean: float
    """Over the tokens of a probe."""

    def exceeded_by(self, gap: Gap) -> bool:
        """Whether a gap is too large, or not a number."""
        return not (gap.largest <= self.largest and gap.mean <= self.mean)

    def __str__(self) -> str:
        bounds = (("max", self.largest), ("mean", self.mean))
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound < float("inf"))


FULL_PRECISION = GapLimit(largest=1e-3, mean=1e-4)
"""Healthy engines are within 5e-6. Faults begin at a few 1e-3, where the policy hardly depends on what is stale."""
HALF_PRECISION = GapLimit(largest=float("inf"), mean=0.05)
"""Healthy: mean 8e-3, single tokens up to 4e-2 for a tiny model; outliers grow with the model, so the mean decides."""


@dataclass(frozen=True)
class Gap:
    """|log-prob of the engine - log-prob of the trainer| over the sampled tokens of one probe."""

    probe: str
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.probe}: max {self.largest:.2g}, mean {self.mean:.2g}"


class SyncCheckError(RuntimeError):
    """Engine and trainer do not hold the same policy."""


class SyncCheck:
    """Called after every sync of an engine; measures after the first and every ``every``-th.

    Args:
        policy: The trainer's.
        limit: Largest gap that passes.
        every: Syncs from one measurement to the next.
        context_tokens: Of the engine; a probe that does not fit is left out.
        images: Most images a prompt that the engine takes.
        recover: Before giving up, push all weights again, and if that does not help leave a risky memory mode.

    Raises:
        SyncCheckError: From a call: the gap is too large on some rank, and stayed so.
    """

    def __init__(
        self, policy: Policy, *, limit: GapLimit, every: int, context_tokens: int, images: int, recover: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"sync check: every is {every}; use at least 1 (after every sync), or no sync check")
        self.policy = policy
        self.limit = limit
        self.every = every
        self.recover = recover
        self.requests = probes(policy, context_tokens=context_tokens, images=images)
        self.syncs = 0

    def __call__(self, managed: ManagedEngine) -> None:
        """Count a sync, and measure if it is due."""
        self.syncs += 1
        if (self.syncs - 1) % self.every == 0:
            self.check(managed)

    def check(self, managed: ManagedEngine) -> None:
        """Measure now; all ranks together."""
        gaps, exceeded = self._measure(managed)
        if not exceeded:
            return
        cause = likely_cause(gaps, self.limit)
        cast(BatchEngine, managed.engine).reset_caches()
        if not self._measure(managed)[1]:
            cause = "caches: without them the gap is gone, so they were not emptied when the weights changed"
        differences = "; ".join(map(str, gaps))
        if self.recover and self._recovers(managed, differences):
            return
        raise SyncCheckError(
            f"after a sync the engine's log-probs differ from the trainer's by more than {self.limit} nats: "
            f"{differences}. It would sample from another policy than the one that is trained. Likely cause: {cause}"
        )

    @torch.no_grad()
    def _measure(self, managed: ManagedEngine) -> tuple[list[Gap], bool]:
        """The gaps of new samples on this rank, and whether one is too large on any rank: all must stop together."""
        policy, requests, samples = self.policy, self.requests, len(self.requests[0].seeds)
        sampling = Sampling(max_tokens=RESPONSE_TOKENS, temperature=policy.temperature)
        rollouts = run_episodes(managed.engine, policy, requests, sampling)
        ids_NT, mask_NT, engine_NT = (
            pad_sequence([getattr(rollout, name) for rollout in rollouts], batch_first=True).to(policy.device)
            for name in ("response_ids", "sampled_mask", "engine_logprobs")
        )
        batch = PolicyBatch(tuple(request.inputs for request in requests), samples, ids_NT, mask_NT)
        gap_NT = (policy(batch).logp_NT - engine_NT).abs().masked_fill(~mask_NT, 0.0)
        gap_P, tokens_P = (x.unflatten(0, (-1, samples)).flatten(1) for x in (gap_NT, mask_NT))
        rows = zip(requests, gap_P.amax(1).tolist(), (gap_P.sum(1) / tokens_P.sum(1)).tolist(), strict=True)
        gaps = [Gap(request.prompt.uid, largest, mean) for request, largest, mean in rows]
        exceeded = torch.tensor(float(any(map(self.limit.exceeded_by, gaps))), device=policy.device)
        return gaps, bool(max_over_ranks(exceeded))

    def _recovers(self, managed: ManagedEngine, differences: str) -> bool:
        log.warning("engine and trainer differ (%s); all weights are pushed again", differences)
        managed.synchronise()
        if not self._measure(managed)[1]:
            return True
        if not cast(BatchEngine, managed.engine).fall_back():
            return False
        log.warning("engine and trainer still differ; the engine uses memory mode 'sleep' from now on")
        managed.engine.sleep()
        managed.engine.wake()
        managed.synchronise()
        return not self._measure(managed)[1]


def probes(policy: Policy, *, context_tokens: int, images: int) -> list[Request]:
    """Requests that never change: a short text, an image, and images with a text of more than one cache block.

    A text-only policy, or an engine without images, gets the texts alone.
    """
    shown = images if hasattr(policy.processor, "image_processor") else 0
    prompts = [_prompt(TEXT, "What do you see?", 0)]
    prompts += [_prompt(IMAGE_PROBE, "What is it?", 1)] if shown else []
    sentence = "Look at every part of it before you say what it is. "
    repeats = BLOCK_TOKENS // len(policy.tokenizer(sentence, add_special_tokens=False)["input_ids"]) + 2
    prompts.append(_prompt(LONG if shown else LONG_TEXT, sentence * repeats, min(shown, 2)))
    encoded = zip(prompts, policy.encode(prompts), strict=True)
    fitting = [(p, inputs) for p, inputs in encoded if len(inputs) + RESPONSE_TOKENS <= context_tokens]
    if not fitting:
        raise ValueError(f"sync check: the shortest probe exceeds the engine's context of {context_tokens} tokens")
    return [
        Request(p, inputs, group, tuple(seed_from("sync_check", p.uid) % 2**61 + k for k in range(SAMPLES)))
        for group, (p, inputs) in enumerate(fitting)
    ]


def _prompt(uid: str, text: str, images: int) -> Prompt:
    """With images of coloured noise: no two regions are equal, so a wrong position or resolution changes log-probs."""
    from PIL import Image

    draw, shape = torch.Generator().manual_seed(0), (images, SIDE_PIXELS, SIDE_PIXELS, 3)
    noise = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).numpy()
    return Prompt(uid, (Message("user", (*([IMAGE] * images), text)),), tuple(map(Image.fromarray, noise)))


def likely_cause(gaps: Sequence[Gap], limit: GapLimit) -> str:
    """What usually causes such a pattern of gaps; a probe above a tenth of the limit counts as affected."""
    threshold = GapLimit(limit.largest / 10, limit.mean / 10)
    affected = {gap.probe for gap in gaps if threshold.exceeded_by(gap)}
    if affected <= {LONG, LONG_TEXT}:
        return "prefix cache: only prompts longer than a block differ; their cached keys and values may be stale"
    if TEXT not in affected:
        return "vision tower, connector or encoder cache: only prompts with images differ"
    return "language layers, head (lm_head.weight is pushed also when tied) or adapters did not arrive, or not all"
