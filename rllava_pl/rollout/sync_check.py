"""A few fixed prompts that engine and trainer both score: whatever makes their log-probs differ stops the run.

After a sync the engine samples the probes, the trainer scores the sampled tokens, and the two must agree. Weights that
did not arrive (vision tower, head, one adapter) and answers from caches of the old weights all show as a gap. The
pictures are drawn here, and the longest prompt is longer than a block of vLLM's prefix cache, so that a stale block is
read if there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.nn.utils.rnn import pad_sequence

from rllava_pl.distributed.collectives import max_over_ranks
from rllava_pl.functional.seeds import seed_from
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.engine import ManagedEngine, check_rollouts
from rllava_pl.types import IMAGE, Message, PolicyBatch, Prompt, Request, RolloutEngine, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

BLOCK_TOKENS = 128
"""A block of vLLM's prefix cache on a CPU; 16 on GPUs. Only whole blocks are ever reused."""
RESPONSE_TOKENS = 8
SAMPLES = 4
SIDE_PIXELS = 56
TEXT, LONG_TEXT, PICTURE, LONG = "a text", "a long text", "a picture", "pictures and a long text"
"""The probes."""


@dataclass(frozen=True)
class Limit:
    """How far engine and trainer may be apart, in nats a token."""

    largest: float
    mean: float

    def broken_by(self, gap: Gap) -> bool:
        """Whether a gap is too large, or no number."""
        return not (gap.largest <= self.largest and gap.mean <= self.mean)


LIMITS = {
    # Sound: at most 5e-6. Faults begin at a few 1e-3, where the policy hardly looks at what is stale.
    torch.float32: Limit(largest=1e-3, mean=1e-4),
    # Sound: mean 8e-3 and single tokens up to 4e-2 of a tiny model; outliers grow with the model, so the mean decides.
    torch.bfloat16: Limit(largest=float("inf"), mean=0.05),
    torch.float16: Limit(largest=float("inf"), mean=0.05),
}
"""By the engine's dtype."""


@dataclass(frozen=True)
class Gap:
    """|log-prob of the engine - log-prob of the trainer| over the sampled tokens of one probe."""

    probe: str
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.probe}: max {self.largest:.2g}, mean {self.mean:.2g}"


class CanaryError(RuntimeError):
    """Engine and trainer do not hold the same policy."""


@runtime_checkable
class HasCaches(Protocol):
    """An engine that can be told to forget."""

    def reset_caches(self) -> None:
        """Drop everything that was computed with older weights."""


@runtime_checkable
class HasSaferMode(Protocol):
    """An engine that can give up a risky memory mode."""

    def fall_back(self) -> bool:
        """Use the safer mode from now on; False if there is none."""


class Canary:
    """To be called after every sync of an engine; measures after the first and every ``every``-th.

    Args:
        policy: The trainer's.
        limit: Largest gap that passes.
        every: Syncs from one measurement to the next.
        context_tokens: Of the engine; a probe that does not fit is left out.
        images: Most images a prompt the engine takes.
        recover: Before giving up, push all weights again, and if that does not help give up a risky memory mode.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        limit: Limit,
        every: int = 50,
        context_tokens: int = 4096,
        images: int = 1,
        recover: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"canary: every is {every}; measure at least after every sync (1), or build no canary")
        self.policy = policy
        self.limit = limit
        self.every = every
        self.recover = recover
        self.requests = probes(policy, context_tokens=context_tokens, images=images)
        self.syncs = 0

    def __call__(self, managed: ManagedEngine) -> None:
        """Count a sync, and measure if it is time.

        Raises:
            CanaryError: The gap is too large on some rank, and stayed so.
        """
        self.syncs += 1
        if (self.syncs - 1) % self.every == 0:
            self.check(managed)

    def check(self, managed: ManagedEngine) -> None:
        """Measure now; all ranks together.

        Raises:
            CanaryError: As above.
        """
        gaps = self.measure(managed.engine)
        if not self._breach(gaps):
            return
        causes = self._causes(managed.engine, gaps)
        if self.recover and self._recovered(managed, gaps):
            return
        raise CanaryError(report(gaps, self.limit, causes))

    def measure(self, engine: RolloutEngine) -> list[Gap]:
        """The gap of every probe."""
        return measure(self.policy, engine, self.requests)

    def _breach(self, gaps: Sequence[Gap]) -> bool:
        """On any rank: they must stop together, or the others would wait for ever."""
        broken = torch.tensor(float(any(map(self.limit.broken_by, gaps))), device=self.policy.device)
        return bool(max_over_ranks(broken))

    def _causes(self, engine: RolloutEngine, gaps: Sequence[Gap]) -> str:
        if isinstance(engine, HasCaches):
            engine.reset_caches()
            if not self._breach(self.measure(engine)):
                return "caches: all is well after they are emptied, so they were not when the weights changed"
        return likely_causes(gaps, self.limit)

    def _recovered(self, managed: ManagedEngine, gaps: Sequence[Gap]) -> bool:
        log.warning("engine and trainer differ (%s); all weights are pushed again", "; ".join(map(str, gaps)))
        managed.synchronise()
        if not self._breach(self.measure(managed.engine)):
            return True
        if not (isinstance(managed.engine, HasSaferMode) and managed.engine.fall_back()):
            return False
        log.warning("engine and trainer still differ; the engine goes on in memory mode 'sleep'")
        managed.engine.sleep()
        managed.engine.wake()
        managed.synchronise()
        return not self._breach(self.measure(managed.engine))


def probes(policy: Policy, *, context_tokens: int, images: int) -> list[Request]:
    """Requests that never change: short text, a picture, and pictures behind a text of more than one cache block.

    A text-only policy, or an engine without images, gets the texts alone.
    """
    shown = images if hasattr(policy.processor, "image_processor") else 0
    drafts = [_prompt(TEXT, "What do you see?", 0)]
    drafts += [_prompt(PICTURE, "What is it?", 1)] if shown else []
    drafts.append(_prompt(LONG if shown else LONG_TEXT, _long_text(policy), min(shown, 2)))
    inputs = policy.encode(drafts)
    fitting = [(p, x) for p, x in zip(drafts, inputs, strict=True) if len(x) + RESPONSE_TOKENS <= context_tokens]
    if not fitting:
        raise ValueError(f"canary: not even the shortest probe fits the engine's context of {context_tokens} tokens")
    return [
        Request(prompt, x, group, tuple(seed_from("canary", prompt.uid) % 2**61 + k for k in range(SAMPLES)))
        for group, (prompt, x) in enumerate(fitting)
    ]


def _prompt(uid: str, text: str, images: int) -> Prompt:
    pictures = tuple(_picture(k) for k in range(images))
    return Prompt(uid, (Message("user", (*([IMAGE] * images), text)),), pictures)


def _long_text(policy: Policy) -> str:
    """More tokens than a cache block has."""
    sentence = "Look at every part of it before you say what it is. "
    tokens = len(policy.tokenizer(sentence, add_special_tokens=False)["input_ids"])
    return sentence * (BLOCK_TOKENS // tokens + 2)


def _picture(k: int) -> Image:
    """Coloured noise: no two regions are equal, so that a wrong position or resolution shows."""
    from PIL import Image

    generator = torch.Generator().manual_seed(k)
    pixels = torch.randint(0, 256, (SIDE_PIXELS, SIDE_PIXELS, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def measure(policy: Policy, engine: RolloutEngine, requests: Sequence[Request]) -> list[Gap]:
    """How far engine and trainer are apart on samples that the engine draws now."""
    rollouts = engine.generate(requests, Sampling(max_tokens=RESPONSE_TOKENS, temperature=policy.temperature))
    check_rollouts(requests, rollouts, engine.version)
    samples = len(requests[0].seeds)
    ids_NT, mask_NT, engine_NT = (
        pad_sequence([pick(rollout) for rollout in rollouts], batch_first=True).to(policy.device)
        for pick in (lambda r: r.response_ids, lambda r: r.response_mask, lambda r: r.engine_logprobs)
    )
    batch = PolicyBatch(tuple(request.inputs for request in requests), samples, ids_NT, mask_NT)
    gap_NT = (policy(batch).logp_NT - engine_NT).abs().masked_fill(~mask_NT, 0.0)
    tokens_P = mask_NT.sum(1).unflatten(0, (-1, samples)).sum(1)
    gap_P = gap_NT.unflatten(0, (-1, samples)).flatten(1)
    rows = zip(requests, gap_P.amax(1).tolist(), (gap_P.sum(1) / tokens_P).tolist(), strict=True)
    return [Gap(request.prompt.uid, largest, mean) for request, largest, mean in rows]


def likely_causes(gaps: Sequence[Gap], limit: Limit) -> str:
    """What usually is behind such a pattern of gaps; a tenth of the limit tells probes that are touched at all."""
    touch = Limit(limit.largest / 10, limit.mean / 10)
    touched = {gap.probe for gap in gaps if touch.broken_by(gap)}
    if touched <= {LONG, LONG_TEXT}:
        return "prefix cache: only prompts longer than a block differ; their cached keys and values may be stale"
    if TEXT not in touched:
        return "vision tower, connector or encoder cache: only prompts with pictures differ"
    return "language layers, head (lm_head.weight is pushed also when tied) or adapters did not arrive, or not all"


def report(gaps: Sequence[Gap], limit: Limit, causes: str) -> str:
    """The message that stops a run."""
    allowed = " and ".join(
        f"{name} {bound:g}" for name, bound in (("max", limit.largest), ("mean", limit.mean)) if bound < float("inf")
    )
    return (
        "after a sync the engine's log-probs differ from the trainer's by more than "
        f"{allowed} nats: {'; '.join(map(str, gaps))}. It would sample from another policy than the one that is "
        f"trained. Likely cause: {causes}"
    )
