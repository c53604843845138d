"""Losses of demonstrations and rollouts at once (SFT-RL fusion), and the schedules that mix the two.

All losses take (N, T) tensors, one value a token, and return one:

============== =====================================================================================================
``logp``       log-probs under the policy being trained
``old_logp``   log-probs under the policy that sampled; read at own tokens only
``advantages`` credit of every token; read at own tokens only, unless stated otherwise
``mask``       bool, True at trainable tokens
``demo_mask``  bool, True at tokens of demonstrations, read where ``mask`` is True; the other tokens there are the
               policy's *own*: it sampled them
returned       (N, T) in at least fp32, 0 where masked
raised         ValueError: an option out of its range, a mask that is not boolean, shapes that do not match
============== =====================================================================================================

``p = exp(logp)``, ``ratio = exp(clamp(logp - old_logp, -20, 20))``, and ``clipped`` is
:func:`rllava_pl.functional.losses.clipped` with ``clip_low`` and ``clip_high``, how far the ratio may fall below and
rise above 1 (1 and inf do not clip). LUFFY's loss is reduced with one ``reduce_loss`` over ``mask``, the others with
two, own and demonstration tokens each with their own denominator: with a shared one the weight of imitation would
depend on the length of the demonstrations.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._mixing import check_share, chord_mu, hpt_gate, uft_hint, uft_hint_probability
from rllava_pl.functional._numerics import LOG_RATIO_BOUND, bounded_exp, check_choice, check_mask, raised
from rllava_pl.functional.losses import clipped
from rllava_pl.functional.reduce import masked_mean

__all__ = [
    "ChordWeighting",
    "chord",
    "chord_mu",
    "hpt",
    "hpt_gate",
    "luffy",
    "srft",
    "uft",
    "uft_hint",
    "uft_hint_probability",
]

ChordWeighting = Literal["phi", "p", "none"]


def luffy(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    demo_mask: Tensor,
    *,
    shaping: float = 0.1,
    clip: float | None = None,
) -> Tensor:
    """Own tokens ``-A * ratio``, demonstrations ``-A * p / (p + shaping)``; LUFFY (arXiv 2504.14945).

    The behaviour probability of a demonstration counts as 1, so its ratio is p. Shaping raises the gradient of unlikely
    tokens, which with a plain p would be close to 0. Advantages come from groups of rollouts and demonstrations
    together and are read at both.

    Options:
        shaping: The smaller, the more weight on unlikely tokens.
        clip: Clip range of own tokens, down and up; None: no clipping.

    >>> logp, old = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 0.25]]).log()
    >>> luffy(logp, old, torch.ones(1, 2), torch.tensor([[True, True]]), torch.tensor([[True, False]]))
    tensor([[-0.8333, -2.0000]])
    """
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}; it must be 0 or a positive distance of the ratio from 1, or None")
    own, demo = _sides(logp, mask, demo_mask, old_logp=old_logp, advantages=advantages)
    clip_low, clip_high = (1.0, math.inf) if clip is None else (clip, clip)
    own_loss = _clipped(own, logp, old_logp, advantages, clip_low, clip_high)
    demo_loss = -_only(demo, advantages) * _shaped(_only(demo, logp), shaping)
    return _merged(own, own_loss, demo, demo_loss)


def srft(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    demo_mask: Tensor,
    rewards_N: Tensor,
    entropy_NT: Tensor,
    *,
    sft_scale: float = 0.5,
    rl_scale: float = 0.1,
    success_threshold: float = 1.0,
    shaping: float | None = 0.1,
) -> Tensor:
    """Likelihood of all tokens, with weight and sign by entropy and success; SRFT (arXiv 2506.19767).

    ======================== ==================================================================
    own, reward >= threshold ``-rl_scale * exp(H) * logp``: more where entropy is high
    own, reward below        ``+logp``: lowers its likelihood
    demonstration            ``-sft_scale * exp(-H) * logp - A * p / (p + shaping)``
    ======================== ==================================================================

    H is the mean entropy of the row's trainable tokens, detached; 0 for a row without any. A reward that is NaN counts
    as failed. Advantages come from groups of rollouts and demonstrations together and are read at demonstrations only.

    Options:
        rewards_N: (N,), one reward a sample; read for rows with own tokens.
        entropy_NT: Entropies in nats under the policy being trained.
        sft_scale: Weight of the likelihood of demonstrations.
        rl_scale: Weight of solved rollouts.
        success_threshold: Smallest reward of a solved rollout.
        shaping: As in :func:`luffy`; None: the plain ``-A * p``.

    >>> logp, mask = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([[True, True], [True, False]])
    >>> demo, rewards = torch.zeros_like(mask), torch.tensor([1.0, 0.9])
    >>> srft(logp, torch.zeros(2, 2), mask, demo, rewards, torch.zeros(2, 2))
    tensor([[ 0.1000,  0.2000],
            [-1.0000,  0.0000]])
    """
    _check_coefficients(sft_scale=sft_scale, rl_scale=rl_scale)
    own, demo = _sides(logp, mask, demo_mask, advantages=advantages)
    if mask.ndim != 2 or rewards_N.shape != mask.shape[:1]:
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)}, mask {tuple(mask.shape)}; they must be (N,) and (N, T)"
        )
    entropy_N1 = masked_mean(entropy_NT.detach(), mask, dim=1).unsqueeze(1)
    solved_N1 = (rewards_N >= success_threshold).unsqueeze(1)
    own_logp, demo_logp = _only(own, logp), _only(demo, logp)
    own_loss = torch.where(solved_N1, -rl_scale * bounded_exp(entropy_N1), 1.0) * own_logp
    ratio = _probability(demo_logp) if shaping is None else _shaped(demo_logp, shaping)
    demo_loss = -sft_scale * bounded_exp(-entropy_N1) * demo_logp - _only(demo, advantages) * ratio
    return _merged(own, own_loss, demo, demo_loss)


def uft(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    demo_mask: Tensor,
    *,
    hint_coef: float = 0.001,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Own tokens ``clipped``, hints ``-hint_coef * logp``: :func:`hpt` with these weights; UFT (arXiv 2505.16984).

    The demonstration tokens of a row are the hint its response begins with, see :func:`uft_hint_probability`.

    Options:
        hint_coef: Weight of the likelihood of hints.

    >>> mask, hint = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    >>> uft(torch.tensor([[-3.0, -1.0, 0.0]]), torch.tensor([[0.0, -1.5, 0.0]]), torch.ones(1, 3), mask, hint)
    tensor([[ 0.0030, -1.2000,  0.0000]])
    """
    _check_coefficients(hint_coef=hint_coef)
    return hpt(logp, old_logp, advantages, mask, demo_mask, sft_coef=hint_coef, clip_low=clip_low, clip_high=clip_high)


def hpt(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    demo_mask: Tensor,
    *,
    sft_coef: float = 1.0,
    rl_coef: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Own tokens ``rl_coef * clipped``, demonstrations ``-sft_coef * logp``; HPT (arXiv 2509.04419).

    :func:`hpt_gate` decides which prompts learn from their demonstration and which from their rollouts.

    Options:
        sft_coef: Weight of demonstrations.
        rl_coef: Weight of rollouts.

    >>> mask, demo = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    >>> hpt(torch.tensor([[-3.0, -1.0, 0.0]]), torch.tensor([[0.0, -1.5, 0.0]]), torch.ones(1, 3), mask, demo)
    tensor([[ 3.0000, -1.2000,  0.0000]])
    """
    _check_coefficients(sft_coef=sft_coef, rl_coef=rl_coef)
    own, demo = _sides(logp, mask, demo_mask, old_logp=old_logp, advantages=advantages)
    own_loss = rl_coef * _clipped(own, logp, old_logp, advantages, clip_low, clip_high)
    return _merged(own, own_loss, demo, -sft_coef * _only(demo, logp))


def chord(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    demo_mask: Tensor,
    *,
    mu: float,
    weighting: ChordWeighting = "phi",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Own tokens ``(1 - mu) * clipped``, demonstrations ``-mu * w * logp``; CHORD (arXiv 2508.11408).

    The weight w is detached. ``"phi"`` takes ``p * (1 - p)``, which is small for tokens that are already likely and for
    very unlikely ones; ``"p"`` takes p, ``"none"`` takes 1 (CHORD-mu, with the schedule :func:`chord_mu`).

    Options:
        mu: Share of the demonstrations, in [0, 1].
        weighting: ``"phi"``, ``"p"`` or ``"none"``.

    >>> mask, demo = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    >>> logp, old = torch.tensor([[0.5, 0.5, 1.0]]).log(), torch.tensor([[1.0, 0.25, 1.0]]).log()
    >>> chord(logp, old, torch.ones(1, 3), mask, demo, mu=0.25)
    tensor([[ 0.0433, -0.9000,  0.0000]])
    """
    check_share("mu", mu)
    check_choice("weighting", weighting, get_args(ChordWeighting))
    own, demo = _sides(logp, mask, demo_mask, old_logp=old_logp, advantages=advantages)
    own_loss = (1 - mu) * _clipped(own, logp, old_logp, advantages, clip_low, clip_high)
    demo_logp = _only(demo, logp)
    p = _probability(demo_logp.detach())
    # 1 - p by expm1: for p near 1 the subtraction would leave rounding errors only
    unlikely = -torch.expm1(demo_logp.detach().clamp(max=LOG_RATIO_BOUND))
    weight = {"phi": p * unlikely, "p": p, "none": torch.ones_like(p)}[weighting]
    return _merged(own, own_loss, demo, -mu * weight * demo_logp)


def _sides(logp: Tensor, mask: Tensor, demo_mask: Tensor, **values: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of own tokens and of demonstration tokens; disjoint, and together ``mask``."""
    check_mask(mask, logp)
    if demo_mask.dtype != torch.bool or demo_mask.shape != mask.shape:
        raise ValueError(
            f"demo_mask has dtype {demo_mask.dtype} and shape {tuple(demo_mask.shape)}; it must be torch.bool and "
            f"{tuple(mask.shape)} like mask (True = token of a demonstration)"
        )
    for name, value in values.items():
        # (N,) would be broadcast along the tokens, silently where N = T
        if value.ndim != mask.ndim:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, logp has {tuple(logp.shape)}; both must hold one value a "
                "token, so spread one value a sample by x[:, None].expand(N, T)"
            )
    return mask & ~demo_mask, mask & demo_mask


def _only(where: Tensor, x: Tensor) -> Tensor:
    """``x`` with 0 elsewhere, so that other tokens influence neither value nor gradient of the branch."""
    return raised(x).masked_fill(~where, 0.0)


def _merged(own: Tensor, own_loss: Tensor, demo: Tensor, demo_loss: Tensor) -> Tensor:
    return torch.where(own, own_loss, torch.where(demo, demo_loss, 0.0))


def _clipped(
    own: Tensor, logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    return clipped(*(_only(own, x) for x in (logp, old_logp, advantages)), clip_low=clip_low, clip_high=clip_high)


def _probability(logp: Tensor) -> Tensor:
    """``exp(logp)`` that cannot overflow where the input is not a log-prob."""
    return logp.clamp(max=LOG_RATIO_BOUND).exp()


def _shaped(logp: Tensor, shaping: float) -> Tensor:
    """``p / (p + shaping)`` without the division: finite for every log-prob, in value and gradient."""
    if not 0 < shaping < math.inf:
        raise ValueError(f"shaping is {shaping}; p / (p + shaping) needs a positive finite number, e.g. 0.1")
    return torch.sigmoid(logp - math.log(shaping))


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; the weight of a term must be 0 or a positive finite number")
