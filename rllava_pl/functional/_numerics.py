"""Precision, bounded exponentials and argument checks that the functions of this package share."""

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
