"""Losses with one ratio per response; public through :mod:`rllava_pl.functional.losses`, which explains arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._numerics import bounded_exp, raised
from rllava_pl.functional._surrogate import check_clip_range, log_ratio, pessimistic
from rllava_pl.functional.reduce import masked_mean


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """Clipped surrogate of the length-normalised ratio of the response: GSPO-token (arXiv 2507.18071).

    ``s_i = exp(mean_t(logp - old_logp))``, the mean over the row's trainable tokens. Every token has the value ``s_i``
    but a gradient through its own log-prob alone: ``s_it = sg[s_i] * exp(logp - sg[logp])``, sg = no gradient. The loss
    is that of :func:`~rllava_pl.functional.losses.clipped` with ``s_it`` in place of the ratio: a response is kept or
    clipped as a whole. A mean varies far less than its terms, hence ranges a thousandth as wide as PPO's.

    >>> logp, mask = torch.tensor([[0.1, -0.2, -0.3]]), torch.ones(1, 3, dtype=torch.bool)
    >>> gspo(logp, torch.zeros(1, 3), torch.ones(1, 3), mask)
    tensor([[-0.8752, -0.8752, -0.8752]])
    """
    sequence_log_ratio = _row_mean(log_ratio(logp, old_logp), mask).detach()
    # Exactly 0, with the gradient of logp; added as one term, so that log-probs of -30 cost s_i no digits.
    own_gradient = log_ratio(logp, logp.detach())
    loss = pessimistic(bounded_exp(sequence_log_ratio + own_gradient), advantages, clip_low, clip_high)
    return loss.masked_fill(~mask, 0.0)


def gmpo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Tensor:
    """The geometric mean of the row's token ratios, clipped token by token: GMPO (arXiv 2507.20673).

    ``-A_i * exp(mean_t(y))`` at every trainable token of row i, ``A_i`` the row's mean advantage (advantages are meant
    to be constant along a row). With ``x = logp - old_logp``, ``y = min(x, clip_high)`` where A_i > 0 and
    ``y = max(x, -clip_low)`` elsewhere: as in PPO, only the side with something to gain is clipped. One extreme token
    moves a geometric mean little, so the range, ``(exp(-0.4), exp(0.4))``, can be wide.

    Options:
        clip_low: How far a log-ratio may fall below 0, in nats.
        clip_high: How far it may rise above 0, in nats.

    >>> logp, mask = torch.tensor([[0.6, 0.1, -0.5]]), torch.ones(1, 3, dtype=torch.bool)
    >>> gmpo(logp, torch.zeros(1, 3), torch.ones(1, 3), mask)
    tensor([[-1., -1., -1.]])
    """
    check_clip_range(clip_low, clip_high, centre="a log-ratio of 0")
    x = log_ratio(logp, old_logp)
    advantage = _row_mean(raised(advantages), mask)
    bounded = torch.where(advantage > 0, x.clamp(max=clip_high), x.clamp(min=-clip_low))
    loss = -advantage * bounded_exp(_row_mean(bounded, mask))
    return loss.expand_as(mask).masked_fill(~mask, 0.0)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(N, 1): mean over the row's trainable tokens, 0 for a row without."""
    return masked_mean(x, mask, dim=1).unsqueeze(1)
