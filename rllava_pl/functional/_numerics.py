"""Precision, ratios, the clipped surrogate and argument checks that the functions of this package share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp(20) = 4.9e8: far above any meaningful ratio, far below the overflow of fp32."""


def raised(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if it is fp64; no copy if the dtype stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """``exp(clamp(log_ratio, -20, 20))``; the gradient is 0 outside of the bounds."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


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


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the argument and what it may be."""
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(repr(choice) for choice in choices)}")


def check_mask(mask: Tensor, values: Tensor) -> None:
    """Raise ``ValueError`` unless ``mask`` is boolean and covers ``values`` element by element."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be torch.bool (True = trainable token)")
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, the values have {tuple(values.shape)}; they must be equal"
        )
