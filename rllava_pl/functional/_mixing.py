"""How much demonstrations count, by step and by success; public through ``functional.demonstrations``.

``step`` counts the rollout batches trained on so far, from 0. Options out of their range raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional.seeds import seed_from, uniforms


def uft_hint_probability(step: int, *, hint_steps: int, low: float = 0.05, high: float = 0.95) -> float:
    """Probability that a segment of the demonstration is given as a hint: a cosine from ``high`` to ``low``, then 0.

    ``low + (high - low) / 2 * (1 + cos(pi * (step + 1) / hint_steps))`` while ``step < hint_steps`` (UFT, arXiv
    2505.16984): ``low`` is reached at the last of these steps.

    Options:
        hint_steps: Steps with hints; 0: never.
        low: Probability at the last of them, 0 to ``high``.
        high: Probability the curve comes from, at most 1.

    >>> [round(uft_hint_probability(step, hint_steps=4), 4) for step in range(5)]
    [0.8182, 0.5, 0.1818, 0.05, 0.0]
    """
    _check_steps(step=step, hint_steps=hint_steps)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low}, high is {high}; probabilities must satisfy 0 <= low <= high <= 1")
    if step >= hint_steps:
        return 0.0
    return low + (high - low) / 2 * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def uft_hint(ids: Sequence[int], p: float, *, segments: int, counters: Sequence[int | str]) -> tuple[int, ...]:
    """The first l of L equal segments of a demonstration's tokens, l ~ Binomial(L, p), L = min(segments, tokens).

    Args:
        ids: Tokens of the demonstration.
        p: Probability that a segment is given.
        segments: Most segments.
        counters: What the draw is a function of, such as seed, rollout and prompt.

    >>> uft_hint([5, 6, 7, 8], 1.0, segments=2, counters=[0]), uft_hint([5, 6, 7, 8], 0.0, segments=2, counters=[0])
    ((5, 6, 7, 8), ())
    """
    seeds = [seed_from(*counters, k) for k in range(min(segments, len(ids)))]
    given = int((uniforms(torch.tensor(seeds), 0) < p).sum()) if seeds else 0
    return tuple(ids[: round(len(ids) * given / max(1, len(seeds)))])


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """Share of the demonstrations at a step: linear warm-up from 0 to ``peak``, cosine to ``valley``, which then stays.

    ``peak * step / warmup_steps``, then with ``x = (step - warmup_steps) / decay_steps`` from 0 to 1
    ``valley + (peak - valley) / 2 * (1 + cos(pi * x))`` (CHORD, arXiv 2508.11408).

    Options:
        warmup_steps: Steps of warm-up; 0: begin at ``peak``.
        decay_steps: Steps from ``peak`` to ``valley``; 0: ``valley`` right after the warm-up.
        peak: Share at the end of the warm-up, 0 to 1.
        valley: Share from ``warmup_steps + decay_steps`` on, 0 to 1.

    >>> [chord_mu(step, warmup_steps=2, decay_steps=2, peak=0.5, valley=0.25) for step in range(6)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.25]
    """
    _check_steps(step=step, warmup_steps=warmup_steps, decay_steps=decay_steps)
    check_share("peak", peak)
    check_share("valley", valley)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    return valley + (peak - valley) / 2 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


def hpt_gate(rewards_N: Tensor, group_N: Tensor, *, success_threshold: float = 1.0, gate: int = 0) -> Tensor:
    """Samples of prompts that learn from their demonstration: at most ``gate`` of the group are solved.

    HPT (arXiv 2509.04419). Their rollouts are dropped and replaced by the demonstration.

    Args:
        rewards_N: One reward a sample, before shaping; NaN counts as failed.
        group_N: int64; equal for samples of one prompt instance, as for :mod:`~rllava_pl.functional.advantages`.
        success_threshold: Smallest reward of a solved sample.
        gate: Number of solved samples up to which the demonstration is used, 0 or positive.

    Returns:
        bool (N,), equal within a group.

    >>> hpt_gate(torch.tensor([1.0, 0.0, 0.9, 0.0]), torch.tensor([5, 5, 2, 2]))
    tensor([False, False,  True,  True])
    """
    if gate < 0:
        raise ValueError(f"gate is {gate}; it counts solved samples of a group and must be 0 or positive")
    return Groups.of(group_N, rewards_N).sum((rewards_N >= success_threshold).long()) <= gate


def check_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a share."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; the share of the demonstrations must lie between 0 and 1")


def _check_steps(**steps: int) -> None:
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; a number of steps must be 0 or positive")
