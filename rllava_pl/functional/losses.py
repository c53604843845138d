"""From log-probs and advantages to a loss of every token, to be minimised.

Nothing here is reduced: :func:`rllava_pl.functional.reduce.reduce_loss` does that, and removes what stands at padding.
``ratio = exp(clamp(logp - old_logp, -20, 20))`` throughout.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._numerics import bounded_exp, check_choice, check_mask, raised

WeightLevel = Literal["token", "sequence"]
WeightMode = Literal["truncate", "mask"]


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
    not clip. ``dual_clip = c`` bounds the loss by ``-A * c`` where A < 0 (arXiv 1912.09729), against ratios that
    explode on a bad token.

    Args:
        logp: Log-probs under the policy being trained, any shape.
        old_logp: Log-probs under the policy that sampled.
        advantages: Credit of every token.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.
        dual_clip: Upper bound of the ratio for negative advantages, above 1; None: no bound.

    Returns:
        The shape of the inputs, in at least fp32.

    Raises:
        ValueError: a negative clip range, or ``dual_clip`` not above 1.

    >>> clipped(torch.tensor([0.5, -0.5, 0.5]), torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]))
    tensor([-1.2000,  0.8000,  1.6487])
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"clip_low is {clip_low}, clip_high is {clip_high}; both must be 0 or positive distances from 1"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio from above and must be larger than 1, or None")
    ratio = bounded_exp(raised(logp) - raised(old_logp))
    penalty = -raised(advantages)
    loss = torch.maximum(penalty * ratio, penalty * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(penalty > 0, torch.minimum(loss, penalty * dual_clip), loss)


def importance_weights(
    old_logp: Tensor,
    engine_logp: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    cap: float = 2.0,
) -> Tensor:
    """Weights that undo the mismatch between the engine that sampled and the trainer: ``exp(old - engine)``, bounded.

    They multiply the policy loss of every token before it is reduced; neither the denominator nor the KL term changes.
    Level ``"sequence"`` sums the differences over a row's trainable tokens first and gives them all the same weight.
    Mode ``"truncate"`` takes ``min(w, cap)`` (truncated importance sampling, F. Yao et al. 2025), ``"mask"`` drops what
    lies above the cap (J. Liu et al. 2025).

    Args:
        old_logp: (N, T), log-probs of the sampled tokens in the trainer's arithmetic.
        engine_logp: (N, T), the engine's; NaN (not reported) counts as no difference.
        mask: bool (N, T), True at trainable tokens.
        level: ``"token"`` or ``"sequence"``.
        mode: ``"truncate"`` or ``"mask"``.
        cap: Largest weight.

    Returns:
        (N, T), detached, 0 where masked.

    Raises:
        ValueError: unknown ``level`` or ``mode``; ``cap`` not positive; a mask that is not boolean or of another shape.

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
