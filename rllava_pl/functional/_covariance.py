"""Losses that treat the few tokens of highest covariance separately; public through ``functional.losses``.

Entropy falls by about the covariance of log-prob and advantage (arXiv 2505.22617), and few tokens carry most of it.
They are selected in the whole mini-batch, before it is split into micro-batches, which then pass slices. The selections
return bool, take no gradient through ``logp``, and take ``old_logp`` in its place before the first update, without a
forward. All tensors are (N, T); beside the arguments of ``losses``:

=============== ====================================================================================================
``ratio``       share of the trainable tokens to select, 0 to 1; never fewer than one token
``selected_NT`` bool: the slice of what the selection chose in the whole mini-batch; None: select among these tokens
=============== ====================================================================================================

The covariance of a token is ``(A - mean A) * (logp - mean logp)``, means over all trainable tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._numerics import bounded_exp, check_mask, log_ratio, pessimistic, plain_and_bounded, raised
from rllava_pl.functional.reduce import masked_mean


def clip_cov(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    ratio: float = 2e-4,
    lower: float = 1.0,
    upper: float = 5.0,
    generator: torch.Generator | None = None,
    selected_NT: Tensor | None = None,
) -> Tensor:
    """Clip-Cov: the clipped surrogate, with 0 at a few random tokens of high covariance (arXiv 2505.22617).

    ``ratio``, ``lower``, ``upper`` and ``generator`` are those of :func:`clip_cov_select`, unused with ``selected_NT``.

    >>> logp, mask = torch.tensor([[0.5, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
    >>> selected_NT = torch.tensor([[False, True]])
    >>> clip_cov(logp, torch.zeros(1, 2), torch.ones(1, 2), mask, selected_NT=selected_NT)
    tensor([[-1.6487,  0.0000]])
    """
    check_mask(mask, logp)
    if selected_NT is None:
        selected_NT = clip_cov_select(
            logp,
            old_logp,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            ratio=ratio,
            lower=lower,
            upper=upper,
            generator=generator,
        )
    _check_selected(selected_NT, mask)
    loss = pessimistic(bounded_exp(log_ratio(logp, old_logp)), advantages, clip_low, clip_high)
    return loss.masked_fill(selected_NT | ~mask, 0.0)


def clip_cov_select(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    ratio: float = 2e-4,
    lower: float = 1.0,
    upper: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens that :func:`clip_cov` sets to 0: drawn uniformly among those of high covariance (arXiv 2505.22617).

    A trainable token can be drawn if ``lower < covariance < upper`` and the surrogate does not clip it already.
    ``max(1, int(ratio * trainable tokens))`` are drawn, or all that can be if those are fewer. With fewer than
    1 / ratio trainable tokens (5,000 by default) the one token is a larger share than ``ratio``.

    Options:
        lower: Covariance above which a token can be selected.
        upper: Covariance below which it can: the extremes are excluded.
        generator: Source of the draw, on any device; equal states select equal tokens. None: torch's global one.

    >>> logp, advantages = torch.tensor([[-1.0, -3.0, -2.0, -2.0]]), torch.tensor([[3.0, -1.0, 0.0, -2.0]])
    >>> clip_cov_select(logp, logp, advantages, torch.ones(1, 4, dtype=torch.bool), ratio=0.25)  # cov 3, 1, 0, 0
    tensor([[ True, False, False, False]])
    """
    budget = _budget(ratio, mask)
    if not lower < upper:
        raise ValueError(f"lower is {lower}, upper is {upper}; no covariance lies between, lower must be below upper")
    covariance = _covariance(logp, advantages, mask)
    plain, bounded = plain_and_bounded(bounded_exp(log_ratio(logp.detach(), old_logp)), advantages, clip_low, clip_high)
    eligible = mask & (covariance > lower) & (covariance < upper) & ~(bounded > plain)
    positions = eligible.flatten().nonzero().squeeze(1)
    device = None if generator is None else generator.device
    drawn = torch.randperm(len(positions), generator=generator, device=device)[:budget]
    return _selection(positions[drawn.to(positions.device)], mask)


def kl_cov(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: float = 2e-3,
    beta: float = 1.0,
    selected_NT: Tensor | None = None,
) -> Tensor:
    """KL-Cov: the unclipped surrogate ``-A * ratio``, with a penalty at the highest covariance (arXiv 2505.22617).

    Selected tokens add ``beta * abs(logp - old_logp)``, with the log-ratio unbounded. Its gradient is 0 at exactly
    ``logp = old_logp``: it has no effect before the second update of a rollout batch.

    Options:
        beta: Weight of the penalty.

    >>> logp, old_logp = torch.tensor([[-1.0, -3.0, -2.0, -2.0]]), torch.tensor([[-1.5, -3.0, -2.0, -2.0]])
    >>> advantages, mask = torch.tensor([[3.0, -1.0, 0.0, -2.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> kl_cov(logp, old_logp, advantages, mask, ratio=0.25)  # -3 * exp(0.5) + 0.5 at the first
    tensor([[-4.4462,  1.0000,  0.0000,  2.0000]])
    """
    check_mask(mask, logp)
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; the weight of the penalty must be 0 or positive")
    if selected_NT is None:
        selected_NT = kl_cov_select(logp, advantages, mask, ratio=ratio)
    _check_selected(selected_NT, mask)
    x = log_ratio(logp, old_logp)
    penalty = (beta * x.abs()).masked_fill(~selected_NT, 0.0)
    return (penalty - raised(advantages) * bounded_exp(x)).masked_fill(~mask, 0.0)


def kl_cov_select(logp: Tensor, advantages: Tensor, mask: Tensor, *, ratio: float = 2e-3) -> Tensor:
    """Tokens that :func:`kl_cov` penalises: the trainable ones of largest covariance (arXiv 2505.22617).

    There are ``max(1, int(ratio * trainable tokens))`` of them, none if no token is trainable; ties go to the first.

    >>> logp, advantages = torch.tensor([[-1.0, -3.0, -2.0, -2.0]]), torch.tensor([[3.0, -1.0, 0.0, -2.0]])
    >>> kl_cov_select(logp, advantages, torch.ones(1, 4, dtype=torch.bool), ratio=0.5)  # cov 3, 1, 0, 0
    tensor([[ True,  True, False, False]])
    """
    budget = _budget(ratio, mask)
    trainable = mask.flatten().nonzero().squeeze(1)
    order = _covariance(logp, advantages, mask).flatten()[trainable].sort(descending=True, stable=True).indices
    return _selection(trainable[order[:budget]], mask)


def _covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """fp64, detached: each trainable token's covariance; arbitrary where masked."""
    a, b = advantages.detach().double(), logp.detach().double()
    return (a - masked_mean(a, mask)) * (b - masked_mean(b, mask))


def _budget(ratio: float, mask: Tensor) -> int:
    """How many tokens to select: at least one."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; the share of trainable tokens to select must be between 0 and 1")
    return max(1, int(ratio * int(mask.sum())))


def _selection(positions: Tensor, mask: Tensor) -> Tensor:
    """bool, shape of ``mask``: True at the positions of the flattened mask."""
    return torch.zeros_like(mask).flatten().index_fill(0, positions, True).view(mask.shape)


def _check_selected(selected_NT: Tensor, mask: Tensor) -> None:
    if selected_NT.dtype != torch.bool or selected_NT.shape != mask.shape:
        raise ValueError(
            f"selected_NT is {selected_NT.dtype} of shape {tuple(selected_NT.shape)}; "
            f"it must be torch.bool of the mask's shape {tuple(mask.shape)}: pass the rows of this micro-batch"
        )
