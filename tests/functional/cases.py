"""Random cases for the functional core: drawn in blocks, so that a thousand of them cost milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = [(1, 1), (1, 6), (5, 1), (2, 3), (3, 4), (4, 5), (3, 8), (6, 4), (2, 9), (5, 7)]
PER_SHAPE = 100
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
# x = logp - old as fp32 rounds it, |x| <= 20, is off by up to 1e-6, which exp turns into a relative error
RATIO_RTOL = {torch.float32: 4e-6, torch.float64: 1e-10}


class Case(NamedTuple):
    """Two log-prob tensors, a credit and a mask of one shape (N, T)."""

    logp: Tensor
    other: Tensor
    advantages: Tensor
    mask: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Masks with holes; about one row in six is empty and one in six full."""
    kind = torch.rand((*shape[:-1], 1), generator=rng)
    holes = torch.rand(shape, generator=rng) < torch.rand((*shape[:-1], 1), generator=rng)
    return (holes | (kind > 5 / 6)) & (kind > 1 / 6)


def cases(dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """1,000 cases; a tenth of the log-ratios is extreme, far beyond every clip range and bound."""
    rng = generator(seed)
    for rows, tokens in SHAPES:
        shape = (PER_SHAPE, rows, tokens)
        logp, step, advantages = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
        extreme = torch.rand(shape, generator=rng) < 0.1
        logp = logp - 3
        other = logp + step * torch.where(extreme, 15.0, 0.3)
        mask = masks(shape, rng)
        yield from map(Case, logp.to(dtype), other.to(dtype), advantages.to(dtype), mask)


def grouped_rewards(dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """1,000 pairs of rewards and group ids: unequal groups, groups of one, ties, arbitrary unordered ids."""
    rng = generator(seed)
    ids = torch.tensor([7, -3, 2**40, 0, 11, -(2**50)])
    levels = torch.tensor([0.0, 0.1, 0.98, 1.0], dtype=torch.float64)
    for size in range(1, 21):
        group = ids[torch.randint(len(ids), (50, size), generator=rng)]
        tied = levels[torch.randint(len(levels), (50, size), generator=rng)]
        free = 3 * torch.randn((50, size), generator=rng, dtype=torch.float64)
        rewards = torch.where(torch.rand((50, 1), generator=rng) < 0.5, tied, free)
        yield from zip(rewards.to(dtype), group, strict=True)


def matrix(rows: list[list[float]], like: Tensor) -> Tensor:
    """A slow reference's nested lists as an fp64 tensor of the shape of ``like``."""
    return torch.tensor(rows, dtype=torch.float64).reshape(like.shape)


def assert_near(actual: Tensor, expected: Tensor, *, dtype: torch.dtype, rtol: float | None = None) -> None:
    """``actual`` has the dtype and agrees with the fp64 ``expected`` to the tolerance of that dtype."""
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance if rtol is None else rtol)


class Mixed(NamedTuple):
    """Rollouts and demonstrations in one batch: (N, T) each, ``rewards`` (N,)."""

    logp: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    demo: Tensor
    rewards: Tensor
    entropy: Tensor


def mixed_cases(dtype: torch.dtype, seed: int = 0) -> Iterator[Mixed]:
    """:func:`cases` with demonstrations: whole rows, hints at their start, holes, none; some stand at masked tokens.

    A twentieth of the log-probs lies far below the rest and a twentieth is exactly 0.
    """
    rng = generator(seed + 1)
    rewards = torch.tensor([-1.0, 0.0, 0.9, 1.0, 1.1], dtype=torch.float64)
    for logp, old, advantages, mask in cases(torch.float64, seed):
        kind, start, rare, scattered = (
            torch.rand(shape, generator=rng) for shape in [(len(logp), 1)] * 2 + [logp.shape] * 2
        )
        hint = torch.arange(logp.shape[1]) < start * logp.shape[1]
        demo = (kind > 0.75) | (hint & (kind > 0.5)) | ((scattered < 0.5) & (kind > 0.25) & (kind <= 0.5))
        logp = torch.where(rare < 0.05, 20 * logp, logp.masked_fill(rare > 0.95, 0.0))
        entropy = 3 * torch.rand(logp.shape, generator=rng, dtype=torch.float64)
        drawn = rewards[torch.randint(len(rewards), (len(logp),), generator=rng)]
        floats = (x.to(dtype) for x in (logp, old, advantages))
        yield Mixed(*floats, mask, demo, drawn.to(dtype), entropy.to(dtype))


def pairs(dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """1,000 quadruples (N,) of summed log-probs: chosen and rejected, then both under a reference; some far apart."""
    rng = generator(seed)
    for size in range(1, 11):
        distance = torch.where(torch.rand((100, 1, size), generator=rng) < 0.1, 1000.0, 5.0)
        reference = -300 * torch.rand((100, 2, size), generator=rng, dtype=torch.float64)
        policy = reference + distance * torch.randn((100, 2, size), generator=rng, dtype=torch.float64)
        yield from map(tuple, torch.cat([policy, reference], 1).to(dtype).unbind())


def rows(*tensors: Tensor) -> Iterator[tuple[list[float], ...]]:
    """(N, T) tensors row by row, as Python numbers: what the slow references loop over."""
    yield from zip(*(tensor.tolist() for tensor in tensors), strict=True)


def slow_ratio(log_ratio: float) -> float:
    """``exp(clamp(log ratio, -20, 20))`` of a Python number."""
    return math.exp(min(max(log_ratio, -20.0), 20.0))
