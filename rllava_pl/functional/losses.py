"""From log-probs and advantages to a loss of every token, to be minimised.

=================================== ================================================================================
:func:`reinforce`                   the policy gradient itself; with advantage 1, the loss of supervised fine-tuning
:func:`clipped`                     no gradient beyond a range of the token's ratio: PPO, GRPO, DAPO
:func:`cispo`                       every token keeps its gradient, with a bounded weight
:func:`sapo`                        a gate that falls smoothly away from ratio 1
:func:`gspo`, :func:`gmpo`          one ratio a response: the geometric mean of those of its tokens
:func:`clip_cov`, :func:`kl_cov`    exclude or penalise tokens that reduce entropy; chosen by ``..._select``
:func:`value_clipped`               for a critic
:func:`importance_weights`          factors in front of a policy loss, against the mismatch between engine and trainer
=================================== ================================================================================

All are per token: :func:`rllava_pl.functional.reduce.reduce_loss` reduces them, and ignores padding.
``ratio = exp(clamp(logp - old_logp, -20, 20))`` throughout. At ``logp = old_logp``, with advantages constant along each
row, every policy loss has the gradient of :func:`reinforce` (:func:`clip_cov`: except at its selected tokens); they
differ in how the gradient changes with the ratio.

============== =====================================================================================================
``logp``       log-probs under the policy being trained, any shape; (N, T) where there is a mask
``old_logp``   log-probs under the policy that sampled
``advantages`` credit of every token
``mask``       bool (N, T), True at trainable tokens
``clip_low``   how far the ratio may fall below 1
``clip_high``  how far it may rise above 1
returned       the shape of the inputs, in at least fp32, 0 where masked
raised         ValueError: an option out of its range, a mask that is not boolean or of another shape
============== =====================================================================================================
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._covariance import clip_cov, clip_cov_select, kl_cov, kl_cov_select
from rllava_pl.functional._numerics import (
    bounded_exp,
    check_choice,
    check_clip_range,
    check_mask,
    log_ratio,
    pessimistic,
    raised,
)
from rllava_pl.functional.reduce import masked_mean

__all__ = [
    "WeightLevel",
    "WeightMode",
    "cispo",
    "clip_cov",
    "clip_cov_select",
    "clipped",
    "gmpo",
    "gspo",
    "importance_weights",
    "kl_cov",
    "kl_cov_select",
    "reinforce",
    "sapo",
    "value_clipped",
]

WeightLevel = Literal["token", "sequence"]
WeightMode = Literal["truncate", "mask"]


def reinforce(logp: Tensor, advantages: Tensor) -> Tensor:
    """The policy gradient: ``-A * logp`` (R. J. Williams 1992). With A = 1, the token loss of supervised fine-tuning.

    It has no ratio and is therefore valid for one update on each rollout batch.

    >>> reinforce(torch.tensor([-1.0, -0.5]), torch.tensor([2.0, -1.0]))
    tensor([ 2.0000, -0.5000])
    """
    return -raised(advantages) * raised(logp)


def clipped(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate: ``max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))``.

    arXiv 1707.06347; with two ranges, "clip higher" of DAPO (arXiv 2503.14476). ``clip_low=1.0, clip_high=inf`` does
    not clip. ``dual_clip = c`` bounds the loss by ``-A * c`` where A < 0 (arXiv 1912.09729), against very large
    ratios of bad tokens.

    Options:
        dual_clip: Upper bound of the ratio for negative advantages, above 1; None: no bound.

    >>> clipped(torch.tensor([0.5, -0.5, 0.5]), torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]))
    tensor([-1.2000,  0.8000,  1.6487])
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio from above and must be larger than 1, or None")
    loss = pessimistic(bounded_exp(log_ratio(logp, old_logp)), advantages, clip_low, clip_high)
    if dual_clip is None:
        return loss
    penalty = -raised(advantages)
    return torch.where(penalty > 0, torch.minimum(loss, penalty * dual_clip), loss)


def cispo(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """REINFORCE with a bounded importance weight: ``-sg[clip(ratio, 1 - clip_low, 1 + clip_high)] * A * logp``.

    CISPO (arXiv 2506.13585); sg = no gradient. Unlike with :func:`clipped`, a token out of range keeps a gradient.
    ``clip_low=1.0`` is no lower bound, which is usual. Ranges are distances from 1: ``clip_high=4.0`` is the upper
    bound of 5.0 that ScaleRL recommends (arXiv 2510.13786).

    Only the gradient of the result has a meaning.

    >>> logp, old_logp = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -1.5])
    >>> cispo(logp, old_logp, torch.tensor([1.0, -2.0]), clip_low=1.0, clip_high=4.0)
    tensor([ 5.0000, -3.2974])
    """
    check_clip_range(clip_low, clip_high)
    weight = bounded_exp(log_ratio(logp, old_logp)).detach().clamp(1 - clip_low, 1 + clip_high)
    return weight * reinforce(logp, advantages)


def sapo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """A soft gate in place of the clip: ``-A * 4 / temperature * sigmoid(temperature * (ratio - 1))``.

    SAPO (arXiv 2511.20347). The gradient with respect to the ratio is A at ratio 1 and falls smoothly on both sides of
    it, the faster the higher the temperature.

    Options:
        temperature_positive: Where A > 0.
        temperature_negative: Elsewhere; higher, because lowering one token raises all others, good or bad.

    >>> sapo(torch.tensor([1.5, 1.5, 1.0]).log(), torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]))
    tensor([-2.4898,  2.3936, -4.0000])
    """
    for name, value in (("positive", temperature_positive), ("negative", temperature_negative)):
        if not 0 < value < math.inf:
            raise ValueError(f"temperature_{name} is {value}; it must be positive and finite")
    ratio, advantages = bounded_exp(log_ratio(logp, old_logp)), raised(advantages)
    # Filled, not torch.where of two numbers: that would be fp32 even beside fp64.
    temperature = torch.full_like(ratio, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    return -advantages * (4 / temperature) * torch.sigmoid(temperature * (ratio - 1))


def gspo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Tensor:
    """Clipped surrogate of the length-normalised ratio of the response: GSPO-token (arXiv 2507.18071).

    ``s_i = exp(mean_t(logp - old_logp))``, the mean over the row's trainable tokens. Every token has the value ``s_i``
    but a gradient through its own log-prob alone: ``s_it = sg[s_i] * exp(logp - sg[logp])``, sg = no gradient. The loss
    is that of :func:`clipped` with ``s_it`` in place of the ratio: a response is kept or
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
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 0.4, clip_high: float = 0.4
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


def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.5) -> Tensor:
    """A critic's loss: ``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``.

    Moving further than ``clip`` from the value at the time of the rollout does not lower the loss. The clip comes from
    OpenAI's PPO code; the paper (arXiv 1707.06347) has the plain square, which is ``clip=inf``.

    Args:
        values: Values under the critic being trained, any shape.
        old_values: Values at the time of the rollout.
        returns: What the values are to predict.
        clip: How far a value may move, in units of the reward; inf: anywhere.

    >>> value_clipped(torch.tensor([1.0, 0.2]), torch.zeros(2), torch.tensor([2.0, 0.1]))
    tensor([1.1250, 0.0050])
    """
    if not clip >= 0:
        raise ValueError(f"clip is {clip}; it must be 0 or a positive distance from the old value")
    values, old_values, returns = raised(values), raised(old_values), raised(returns)
    near = values.clamp(old_values - clip, old_values + clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def importance_weights(
    old_logp: Tensor,
    engine_logp: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    cap: float = 2.0,
) -> Tensor:
    """Weights that correct the mismatch between engine and trainer: ``exp(old - engine)``, bounded.

    They multiply the policy loss of every token before it is reduced; neither the denominator nor the KL term changes.
    Level ``"sequence"`` sums the differences over a row's trainable tokens first and gives them all the same weight.
    Mode ``"truncate"`` takes ``min(w, cap)`` (truncated importance sampling, F. Yao et al. 2025), ``"mask"`` sets
    weights above the cap to 0 (J. Liu et al. 2025).

    Args:
        old_logp: (N, T), log-probs of the sampled tokens in the trainer's arithmetic.
        engine_logp: (N, T), the engine's; NaN (not reported) counts as no difference.
        mask: bool (N, T), True at trainable tokens.
        level: ``"token"`` or ``"sequence"``.
        mode: ``"truncate"`` or ``"mask"``.
        cap: Largest weight, positive.

    Returns:
        (N, T), detached, 0 where masked.

    >>> old, engine = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -1.5, -0.5]])
    >>> importance_weights(old, engine, torch.tensor([[True, True, False]]))
    tensor([[2.0000, 1.6487, 0.0000]])
    """
    check_choice("level", level, get_args(WeightLevel))
    check_choice("mode", mode, get_args(WeightMode))
    if not cap > 0:
        raise ValueError(f"cap is {cap}; the largest weight must be positive")
    check_mask(mask, old_logp)
    # fp64: a sum over thousands of tokens is exponentiated, which turns its rounding into a relative error.
    difference = old_logp.detach().double() - engine_logp.detach().double()
    difference = difference.masked_fill(~mask | engine_logp.isnan(), 0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    weights = bounded_exp(difference)
    bounded = weights.clamp(max=cap) if mode == "truncate" else weights.masked_fill(weights > cap, 0.0)
    return bounded.expand_as(mask).masked_fill(~mask, 0.0).to(raised(old_logp).dtype)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(N, 1): mean over the row's trainable tokens, 0 for a row without."""
    return masked_mean(x, mask, dim=1).unsqueeze(1)
