"""How much demonstrations count, by step and by success; public through ``functional.demonstrations``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional.seeds import uniforms


def uft_hint_probability(step: int, *, hint_steps: int, low: float = 0.05, high: float = 0.95) -> float:
    """Probability that a segment of the demonstration is given as a hint: a cosine from ``high`` to ``low``, then 0.

    ``low + (high - low) / 2 * (1 + cos(pi * (step + 1) / hint_steps))`` while ``step < hint_steps`` (UFT, arXiv
    2505.16984): ``low`` is reached at the last of these steps.

    Args:
        step: Rollout batches trained on so far, from 0.
        hint_steps: Steps with hints; 0: never.
        low: Probability at the last of them.
        high: Probability the curve comes from.

    Returns:
        A number in [low, high], or 0.

    Raises:
        ValueError: negative steps, probabilities outside of [0, 1] or ``low`` above ``high``.

    >>> [round(uft_hint_probability(step, hint_steps=4), 4) for step in range(5)]
    [0.8182, 0.5, 0.1818, 0.05, 0.0]
    """
    _check_steps(step=step, hint_steps=hint_steps)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low}, high is {high}; probabilities must satisfy 0 <= low <= high <= 1")
    if step >= hint_steps:
        return 0.0
    return low + (high - low) / 2 * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def uft_hint_length(tokens: int, p: float, seeds: Sequence[int]) -> int:
    """Tokens of a hint: the first l of L equal segments of a demonstration, l ~ Binomial(L, p), a draw a seed.

    >>> uft_hint_length(10, 1.0, [1, 2, 3]), uft_hint_length(10, 0.0, [1, 2, 3])
    (10, 0)
    """
    given = int((uniforms(torch.tensor(seeds), 0) < p).sum())
    return round(tokens * given / len(seeds))


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """Share of the demonstrations at a step: linear warm-up from 0 to ``peak``, cosine to ``valley``, which then stays.

    ``peak * step / warmup_steps``, then with ``x = (step - warmup_steps) / decay_steps`` from 0 to 1
    ``valley + (peak - valley) / 2 * (1 + cos(pi * x))`` (CHORD, arXiv 2508.11408).

    Args:
        step: Rollout batches trained on so far, from 0.
        warmup_steps: Steps of warm-up; 0: begin at ``peak``.
        decay_steps: Steps from ``peak`` to ``valley``; 0: ``valley`` right after the warm-up.
        peak: Share at the end of the warm-up.
        valley: Share from ``warmup_steps + decay_steps`` on.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: negative steps, ``peak`` or ``valley`` outside of [0, 1].

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
        group_N: int64; equal for samples of one prompt instance. Ids are arbitrary, groups may be unequal.
        success_threshold: Smallest reward of a solved sample.
        gate: Number of solved samples up to which the demonstration is used.

    Returns:
        bool (N,), equal within a group.

    Raises:
        ValueError: ``gate`` negative, or the two are not vectors of one length.

    >>> hpt_gate(torch.tensor([1.0, 0.0, 0.9, 0.0]), torch.tensor([5, 5, 2, 2]))
    tensor([False, False,  True,  True])
    """
    if gate < 0:
        raise ValueError(f"gate is {gate}; it counts solved samples of a group and must be 0 or positive")
    solved_N = (rewards_N >= success_threshold).to(torch.int64)
    return Groups.of(group_N, rewards_N).sum(solved_N) <= gate


def check_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a share."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; the share of the demonstrations must lie between 0 and 1")


def _check_steps(**steps: int) -> None:
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; a number of steps must be 0 or positive")
