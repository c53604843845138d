"""Parts of PPO's clipped surrogate that several losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._numerics import raised


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """``logp - old_logp``, unbounded, in at least fp32."""
    return raised(logp) - raised(old_logp)


def pessimistic(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))``."""
    return torch.maximum(*plain_and_bounded(ratio, advantages, clip_low, clip_high))


def plain_and_bounded(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """``-A * ratio`` and ``-A * clip(ratio, 1 - clip_low, 1 + clip_high)``; where the second is larger, it clips."""
    check_clip_range(clip_low, clip_high)
    penalty = -raised(advantages)
    return penalty * ratio, penalty * ratio.clamp(1 - clip_low, 1 + clip_high)


def check_clip_range(clip_low: float, clip_high: float, centre: str = "1") -> None:
    """Raise ``ValueError`` unless both are distances from the ``centre`` of the range."""
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"clip_low is {clip_low}, clip_high is {clip_high}; both must be 0 or positive distances from {centre}"
        )
