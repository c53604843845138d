"""Losses that treat apart the few tokens which cost a policy its entropy; public through ``functional.losses``.

Entropy falls by about the covariance of log-prob and advantage (arXiv 2505.22617), and a handful of tokens carries most
of it. Which ones is a statement about the whole mini-batch: select once, before micro-batches are cut, and pass slices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._numerics import bounded_exp, check_mask, raised
from rllava_pl.functional._surrogate import log_ratio, pessimistic, plain_and_bounded
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

    Args:
        logp: (N, T), log-probs under the policy being trained.
        old_logp: (N, T), under the policy that sampled.
        advantages: (N, T), credit of every token.
        mask: bool (N, T), True at trainable tokens.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.
        ratio: See :func:`clip_cov_select`, as ``lower``, ``upper`` and ``generator``; none is used if tokens are given.
        lower: Covariance above which a token can be selected.
        upper: Covariance below which it can.
        generator: Source of the draw.
        selected_NT: bool (N, T), tokens to silence: a slice of what :func:`clip_cov_select` chose in the whole
            mini-batch. None: choose among the tokens given here.

    Returns:
        (N, T), in at least fp32; 0 where masked or selected.

    Raises:
        ValueError: a negative clip range; arguments that :func:`clip_cov_select` refuses; ``mask`` or ``selected_NT``
            that is not boolean or of another shape.

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
    """Tokens that :func:`clip_cov` silences: a uniform random draw among those of high covariance (arXiv 2505.22617).

    ``cov = (A - mean A) * (logp - mean logp)``, means over all trainable tokens. A trainable token can be drawn if
    ``lower < cov < upper`` and the surrogate does not clip it anyway. ``max(1, int(ratio * trainable tokens))`` are
    drawn, or all that can be if those are fewer. With less than 1 / ratio trainable tokens (5,000 by default) the one
    token is a larger share than ``ratio``.

    Args:
        logp: (N, T), log-probs under the policy being trained; no gradient flows. Before the first update of a
            mini-batch ``old_logp`` serves, without a forward.
        old_logp: (N, T), under the policy that sampled.
        advantages: (N, T), credit of every token.
        mask: bool (N, T), True at trainable tokens.
        clip_low: How far the ratio may fall below 1 before the surrogate clips.
        clip_high: How far it may rise above 1.
        ratio: Share of the trainable tokens to silence, 0 to 1; never fewer than one token.
        lower: Covariance above which a token can be drawn.
        upper: Covariance below which it can: the extremes are left alone.
        generator: Source of the draw, on any device; equal states select equal tokens. None: torch's global one.

    Returns:
        bool (N, T), False where masked.

    Raises:
        ValueError: a negative clip range; ``ratio`` outside of 0 to 1; ``lower`` not below ``upper``; a mask that is
            not boolean or of another shape.

    >>> logp, advantages = torch.tensor([[-1.0, -3.0, -2.0, -2.0]]), torch.tensor([[3.0, -1.0, 0.0, -2.0]])
    >>> clip_cov_select(logp, logp, advantages, torch.ones(1, 4, dtype=torch.bool), ratio=0.25)  # cov 3, 1, 0, 0
    tensor([[ True, False, False, False]])
    """
    _check_ratio(ratio)
    if not lower < upper:
        raise ValueError(f"lower is {lower}, upper is {upper}; no covariance lies between, lower must be below upper")
    covariance = _covariance(logp, advantages, mask)
    plain, bounded = plain_and_bounded(bounded_exp(log_ratio(logp.detach(), old_logp)), advantages, clip_low, clip_high)
    eligible = _positions(mask & (covariance > lower) & (covariance < upper) & ~(bounded > plain))
    device = None if generator is None else generator.device
    drawn = torch.randperm(len(eligible), generator=generator, device=device)[: _budget(ratio, mask)]
    return _selection(eligible[drawn.to(eligible.device)], mask)


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
    """KL-Cov: the unclipped surrogate ``-A * ratio``, held back where covariance is highest (arXiv 2505.22617).

    Selected tokens add ``beta * abs(logp - old_logp)``, with the log-ratio unbounded. Its gradient is 0 at exactly
    ``logp = old_logp``: it only acts from the second update on a rollout batch on.

    Args:
        logp: (N, T), log-probs under the policy being trained.
        old_logp: (N, T), under the policy that sampled.
        advantages: (N, T), credit of every token.
        mask: bool (N, T), True at trainable tokens.
        ratio: Share of the trainable tokens to hold back, see :func:`kl_cov_select`; not used if tokens are given.
        beta: Weight of the penalty.
        selected_NT: bool (N, T), tokens to hold back: a slice of what :func:`kl_cov_select` chose in the whole
            mini-batch. None: choose among the tokens given here.

    Returns:
        (N, T), in at least fp32; 0 where masked.

    Raises:
        ValueError: ``beta`` negative; ``ratio`` outside of 0 to 1; ``mask`` or ``selected_NT`` that is not boolean or
            of another shape.

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
    loss = -raised(advantages) * bounded_exp(x)
    penalty = (beta * x.abs()).masked_fill(~selected_NT, 0.0)
    return (loss + penalty).masked_fill(~mask, 0.0)


def kl_cov_select(logp: Tensor, advantages: Tensor, mask: Tensor, *, ratio: float = 2e-3) -> Tensor:
    """Tokens that :func:`kl_cov` holds back: the trainable ones of largest covariance (arXiv 2505.22617).

    ``cov = (A - mean A) * (logp - mean logp)``, means over all trainable tokens. There are
    ``max(1, int(ratio * trainable tokens))`` of them, none if nothing is trainable. Of equal ones the first is taken.

    Args:
        logp: (N, T), log-probs under the policy being trained; no gradient flows. Before the first update of a
            mini-batch ``old_logp`` serves, without a forward.
        advantages: (N, T), credit of every token.
        mask: bool (N, T), True at trainable tokens.
        ratio: Share of the trainable tokens to select, 0 to 1; never fewer than one token.

    Returns:
        bool (N, T), False where masked.

    Raises:
        ValueError: ``ratio`` outside of 0 to 1; a mask that is not boolean or of another shape.

    >>> logp, advantages = torch.tensor([[-1.0, -3.0, -2.0, -2.0]]), torch.tensor([[3.0, -1.0, 0.0, -2.0]])
    >>> kl_cov_select(logp, advantages, torch.ones(1, 4, dtype=torch.bool), ratio=0.5)  # cov 3, 1, 0, 0
    tensor([[ True,  True, False, False]])
    """
    _check_ratio(ratio)
    covariance = _covariance(logp, advantages, mask)
    trainable = _positions(mask)
    order = covariance.flatten()[trainable].sort(descending=True, stable=True).indices
    return _selection(trainable[order[: _budget(ratio, mask)]], mask)


def _covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """fp64 (N, T): each trainable token's term of the covariance of log-prob and advantage; anything where masked."""
    return _centered(advantages, mask) * _centered(logp, mask)


def _centered(x: Tensor, mask: Tensor) -> Tensor:
    """fp64, detached: ``x`` minus its mean over all trainable tokens."""
    values = x.detach().double()
    return values - masked_mean(values, mask)


def _budget(ratio: float, mask: Tensor) -> int:
    """How many tokens to select: at least one."""
    return max(1, int(ratio * int(mask.sum())))


def _positions(mask: Tensor) -> Tensor:
    """int64: where the flattened mask is True, in order."""
    return mask.flatten().nonzero().squeeze(1)


def _selection(positions: Tensor, mask: Tensor) -> Tensor:
    """bool, shape of ``mask``: True at the positions of the flattened mask."""
    return torch.zeros_like(mask).flatten().index_fill(0, positions, True).view(mask.shape)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; the share of trainable tokens to select must be between 0 and 1")


def _check_selected(selected_NT: Tensor, mask: Tensor) -> None:
    if selected_NT.dtype != torch.bool or selected_NT.shape != mask.shape:
        raise ValueError(
            f"selected_NT is {selected_NT.dtype} of shape {tuple(selected_NT.shape)}; "
            f"it must be torch.bool of the mask's shape {tuple(mask.shape)}: pass the rows of this micro-batch"
        )
