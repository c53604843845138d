"""Masked statistics, and the reduction of per-token losses to one number.

Losses are divided by counts of the whole mini-batch over all ranks, never of a micro-batch: only then is the gradient
independent of micro-batch size, packing and number of ranks. Values at masked-out positions, NaN and infinities
included, influence neither value nor gradient. Masks are bool of the shape of the values, True where they count; any
other raises ValueError, as an unknown mode does. Results are in at least fp32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._numerics import check_choice, check_mask, raised

ReduceMode = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True, over everything or over ``dim``; 0 where nothing is selected.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [8.0, 9.0]]), torch.tensor([[True, True], [False, False]]), dim=1)
    tensor([2., 0.])
    """
    total = _masked(x, mask).sum(dim, dtype=torch.float64)
    return (total / mask.sum(dim).clamp(min=1)).to(raised(x).dtype)


def masked_whiten(x_NT: Tensor, mask_NT: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the selected tokens, with the unbiased (n - 1) variance.

    Mean and variance are taken in fp64: in fp32 a constant input would come out as 6e-4. The result is 0 where masked,
    and all 0 for a single selected token.

    >>> masked_whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[-1.,  0.,  1.,  0.]])
    """
    values = _masked(x_NT, mask_NT).double()
    count = mask_NT.sum()
    centered = (values - values.sum() / count.clamp(min=1)).masked_fill(~mask_NT, 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    return (centered / (variance + eps).sqrt()).to(raised(x_NT).dtype)


def loss_denominator(mask_NT: Tensor, mode: ReduceMode, *, max_tokens: int | None = None) -> Tensor:
    """What the numerator of :func:`reduce_loss` is divided by; sum it over ranks before the first backward.

    ==================================================== ==========================================
    ``"token-mean"``                                     selected tokens
    ``"sequence-mean-token-mean"``, ``"...-token-sum"``  rows with at least one selected token
    ``"constant"``                                       N * max_tokens, N = all rows
    ==================================================== ==========================================

    Args:
        mask_NT: Mask of the rank's whole mini-batch. Rows added only as padding must be removed before mode
            ``"constant"``, which counts every row.
        mode: How losses are aggregated.
        max_tokens: Response budget in tokens, positive; needed by ``"constant"`` alone.

    Returns:
        fp32 scalar tensor; 0 where there is nothing to train on.

    >>> mask_NT = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    >>> [loss_denominator(mask_NT, mode, max_tokens=5).item() for mode in get_args(ReduceMode)]
    [4.0, 2.0, 2.0, 15.0]
    """
    check_choice("mode", mode, get_args(ReduceMode))
    check_mask(mask_NT, mask_NT)
    if mode == "constant":
        if max_tokens is None or max_tokens < 1:
            raise ValueError(
                f"max_tokens is {max_tokens}; mode 'constant' divides by it, give the response budget in tokens"
            )
        return torch.tensor(len(mask_NT) * max_tokens, dtype=torch.float32, device=mask_NT.device)
    counted = mask_NT if mode == "token-mean" else mask_NT.any(dim=1)
    return counted.sum().to(torch.float32)


def reduce_loss(
    loss_NT: Tensor,
    mask_NT: Tensor,
    mode: ReduceMode,
    *,
    denominator: Tensor | float | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Reduce a loss of every token to the scalar that is differentiated: numerator / denominator.

    The numerator is the sum over selected tokens; for ``"sequence-mean-token-mean"`` the sum over rows of the row's
    mean (rows must then stay whole when a mini-batch is split). For a micro-batch pass the ``denominator`` of the whole
    mini-batch summed over all ranks, and multiply the result by the number of ranks: data-parallel strategies
    average gradients. The scalar is connected to the graph even if no token is selected.

    Options:
        mode: How losses are aggregated, see :func:`loss_denominator`.
        denominator: Number or scalar tensor; 0 divides by 1, a fraction is taken as it is. None: that of ``mask_NT``.
        max_tokens: Response budget in tokens, for ``"constant"`` without a ``denominator``.

    >>> loss_NT = torch.tensor([[1.0, 1, 1, 1, 1], [10, 10, 0, 0, 0]])
    >>> mask_NT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    >>> reduce_loss(loss_NT, mask_NT, "token-mean"), reduce_loss(loss_NT, mask_NT, "sequence-mean-token-mean")
    (tensor(3.5714), tensor(5.5000))
    """
    check_choice("mode", mode, get_args(ReduceMode))
    if denominator is None:
        denominator = loss_denominator(mask_NT, mode, max_tokens=max_tokens)
    total_N = _masked(loss_NT, mask_NT).sum(1, dtype=torch.float64)
    if mode == "sequence-mean-token-mean":
        total_N = total_N / mask_NT.sum(1).clamp(min=1)
    divisor = torch.as_tensor(denominator, dtype=torch.float64, device=loss_NT.device)
    return (total_N.sum() / divisor.masked_fill(divisor == 0, 1.0)).to(raised(loss_NT).dtype)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with zeros where masked; ``x * mask`` would keep NaN, in the value and in the gradient."""
    check_mask(mask, x)
    return raised(x).masked_fill(~mask, 0.0)
