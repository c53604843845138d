"""Losses that learn from demonstrations and rollouts at once (SFT-RL fusion), and the schedules that mix the two.

``mask`` covers every trainable token. Where ``demo_mask`` is True as well a demonstration gave the token, everywhere
else the policy sampled it: its *own* token. ``p = exp(logp)``, ``ratio = exp(clamp(logp - old_logp, -20, 20))``, and
``clipped`` is :func:`rllava_pl.functional.losses.clipped`. Demonstration tokens have no log-probs under a policy that
sampled them; ``old_logp`` is not read there.

Every loss is one value a token, 0 outside ``mask``, and reduced elsewhere: LUFFY's with one ``reduce_loss`` over
``mask``, the others' with two, own and demonstration tokens each with their own denominator. Under a shared one the
weight of imitation would depend on how long demonstrations happen to be. Inputs are (N, T) if nothing else is said.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import LOG_RATIO_BOUND, bounded_exp, check_choice, check_mask, raised
from rllava_pl.functional.losses import clipped
from rllava_pl.functional.reduce import masked_mean

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

    The behaviour probability of a demonstration counts as 1, so its ratio is p. Shaping lifts the gradient of tokens
    the policy finds unlikely, which a plain p would leave where they are.

    Args:
        logp: Log-probs under the policy being trained.
        old_logp: Log-probs under the policy that sampled; read at own tokens alone.
        advantages: Credit of every token, from groups of rollouts and demonstrations together.
        mask: bool, True at trainable tokens.
        demo_mask: bool, True at tokens of demonstrations; read where ``mask`` is True.
        shaping: The smaller, the more weight on unlikely tokens.
        clip: Clip range of own tokens, down and up; None: no clipping.

    Returns:
        (N, T), in at least fp32, 0 where masked.

    Raises:
        ValueError: ``shaping`` not positive, ``clip`` negative, a mask that is not boolean, shapes that do not match.

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
    """Likelihood of all, its weight and sign by entropy and success; SRFT (arXiv 2506.19767).

    ======================== ==================================================================
    own, reward >= threshold ``-rl_scale * exp(H) * logp``: more where the policy is unsure
    own, reward below        ``+logp``: unlearns
    demonstration            ``-sft_scale * exp(-H) * logp - A * p / (p + shaping)``
    ======================== ==================================================================

    H is the mean entropy of the row's trainable tokens, detached; 0 for a row without any. A reward that is NaN counts
    as failed.

    Args:
        logp: Log-probs under the policy being trained.
        advantages: Credit from groups of rollouts and demonstrations together; read at demonstrations alone.
        mask: bool, True at trainable tokens.
        demo_mask: bool, True at tokens of demonstrations; read where ``mask`` is True.
        rewards_N: (N,), one reward a sample; read for rows with own tokens.
        entropy_NT: Entropies in nats under the policy being trained.
        sft_scale: Weight of the likelihood of demonstrations.
        rl_scale: Weight of solved rollouts.
        success_threshold: Smallest reward of a solved rollout.
        shaping: As in :func:`luffy`; None: the plain ``-A * p``.

    Returns:
        (N, T), in at least fp32, 0 where masked.

    Raises:
        ValueError: a negative scale, ``shaping`` not positive, a mask that is not boolean, shapes that do not match.

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
    """Own tokens ``clipped``, hints ``-hint_coef * logp``; UFT (arXiv 2505.16984).

    The demonstration tokens of a row are the hint its response begins with, see :func:`uft_hint_probability`.

    Args:
        logp: Log-probs under the policy being trained.
        old_logp: Log-probs under the policy that sampled; read at own tokens alone.
        advantages: Credit of every token; read at own tokens alone.
        mask: bool, True at trainable tokens.
        demo_mask: bool, True at tokens of hints; read where ``mask`` is True.
        hint_coef: Weight of the likelihood of hints.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.

    Returns:
        (N, T), in at least fp32, 0 where masked.

    Raises:
        ValueError: a negative coefficient or clip range, a mask that is not boolean, shapes that do not match.

    >>> mask, hint = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    >>> uft(torch.tensor([[-3.0, -1.0, 0.0]]), torch.tensor([[0.0, -1.5, 0.0]]), torch.ones(1, 3), mask, hint)
    tensor([[ 0.0030, -1.2000,  0.0000]])
    """
    _check_coefficients(hint_coef=hint_coef)
    own, demo = _sides(logp, mask, demo_mask, old_logp=old_logp, advantages=advantages)
    own_loss = _clipped(own, logp, old_logp, advantages, clip_low, clip_high)
    return _merged(own, own_loss, demo, -hint_coef * _only(demo, logp))


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

    Which prompts learn from their demonstration and which from their rollouts is up to :func:`hpt_gate`.

    Args:
        logp: Log-probs under the policy being trained.
        old_logp: Log-probs under the policy that sampled; read at own tokens alone.
        advantages: Credit of every token; read at own tokens alone.
        mask: bool, True at trainable tokens.
        demo_mask: bool, True at tokens of demonstrations; read where ``mask`` is True.
        sft_coef: Weight of demonstrations.
        rl_coef: Weight of rollouts.
        clip_low: How far the ratio may fall below 1; 1: any distance.
        clip_high: How far it may rise above 1; inf: any distance.

    Returns:
        (N, T), in at least fp32, 0 where masked.

    Raises:
        ValueError: a negative coefficient or clip range, a mask that is not boolean, shapes that do not match.

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

    The weight w is detached. ``"phi"`` takes ``p * (1 - p)``, which spares what the policy knows already and what would
    overturn it; ``"p"`` takes p, ``"none"`` takes 1 (CHORD-mu, with the schedule :func:`chord_mu`).

    Args:
        logp: Log-probs under the policy being trained.
        old_logp: Log-probs under the policy that sampled; read at own tokens alone.
        advantages: Credit of every token; read at own tokens alone.
        mask: bool, True at trainable tokens.
        demo_mask: bool, True at tokens of demonstrations; read where ``mask`` is True.
        mu: Share of the demonstrations, in [0, 1].
        weighting: ``"phi"``, ``"p"`` or ``"none"``.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.

    Returns:
        (N, T), in at least fp32, 0 where masked.

    Raises:
        ValueError: ``mu`` outside of [0, 1], unknown ``weighting``, a negative clip range, a mask that is not boolean,
            shapes that do not match.

    >>> mask, demo = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    >>> logp, old = torch.tensor([[0.5, 0.5, 1.0]]).log(), torch.tensor([[1.0, 0.25, 1.0]]).log()
    >>> chord(logp, old, torch.ones(1, 3), mask, demo, mu=0.25)
    tensor([[ 0.0433, -0.9000,  0.0000]])
    """
    _check_share("mu", mu)
    check_choice("weighting", weighting, get_args(ChordWeighting))
    own, demo = _sides(logp, mask, demo_mask, old_logp=old_logp, advantages=advantages)
    own_loss = (1 - mu) * _clipped(own, logp, old_logp, advantages, clip_low, clip_high)
    demo_logp = _only(demo, logp)
    return _merged(own, own_loss, demo, -mu * _chord_weight(demo_logp.detach(), weighting) * demo_logp)


def uft_hint_probability(step: int, *, hint_steps: int, low: float = 0.05, high: float = 0.95) -> float:
    """Probability that a segment of the demonstration is given as a hint: a cosine from ``high`` to ``low``, then 0.

    ``low + (high - low) / 2 * (1 + cos(pi * (step + 1) / hint_steps))`` while ``step < hint_steps`` (UFT, arXiv
    2505.16984): ``low`` is reached at the last of these steps.

    Args:
        step: Rollout batches trained on so far, from 0.
        hint_steps: Steps with hints; 0: never.
        low: Probability at the last of them.
        high: Probability the curve comes from.

    Returns:
        A number in [low, high], or 0.

    Raises:
        ValueError: negative steps, probabilities outside of [0, 1] or ``low`` above ``high``.

    >>> [round(uft_hint_probability(step, hint_steps=4), 4) for step in range(5)]
    [0.8182, 0.5, 0.1818, 0.05, 0.0]
    """
    _check_steps(step=step, hint_steps=hint_steps)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low}, high is {high}; probabilities must satisfy 0 <= low <= high <= 1")
    if step >= hint_steps:
        return 0.0
    return low + (high - low) / 2 * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """Share of the demonstrations at a step: linear warm-up from 0 to ``peak``, cosine to ``valley``, which then stays.

    ``peak * step / warmup_steps``, then with ``x = (step - warmup_steps) / decay_steps`` from 0 to 1
    ``valley + (peak - valley) / 2 * (1 + cos(pi * x))`` (CHORD, arXiv 2508.11408).

    Args:
        step: Rollout batches trained on so far, from 0.
        warmup_steps: Steps of warm-up; 0: begin at ``peak``.
        decay_steps: Steps from ``peak`` to ``valley``; 0: ``valley`` right after the warm-up.
        peak: Share at the end of the warm-up.
        valley: Share from ``warmup_steps + decay_steps`` on.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: negative steps, ``peak`` or ``valley`` outside of [0, 1].

    >>> [chord_mu(step, warmup_steps=2, decay_steps=2, peak=0.5, valley=0.25) for step in range(6)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.25]
    """
    _check_steps(step=step, warmup_steps=warmup_steps, decay_steps=decay_steps)
    _check_share("peak", peak)
    _check_share("valley", valley)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    return valley + (peak - valley) / 2 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


def hpt_gate(rewards_N: Tensor, group_N: Tensor, *, success_threshold: float = 1.0, gate: int = 0) -> Tensor:
    """Samples of prompts that are to learn from their demonstration: at most ``gate`` of the group are solved.

    HPT (arXiv 2509.04419). Their rollouts are dropped and the demonstration takes their place.

    Args:
        rewards_N: One reward a sample, before shaping; NaN counts as failed.
        group_N: int64; equal for samples of one prompt instance. Ids are arbitrary, groups may be unequal.
        success_threshold: Smallest reward of a solved sample.
        gate: Number of solved samples up to which the demonstration is used.

    Returns:
        bool (N,), equal within a group.

    Raises:
        ValueError: ``gate`` negative, or the two are not vectors of one length.

    >>> hpt_gate(torch.tensor([1.0, 0.0, 0.9, 0.0]), torch.tensor([5, 5, 2, 2]))
    tensor([False, False,  True,  True])
    """
    if gate < 0:
        raise ValueError(f"gate is {gate}; it counts solved samples of a group and must be 0 or positive")
    solved_N = (rewards_N >= success_threshold).to(torch.int64)
    return Groups.of(group_N, rewards_N).sum(solved_N) <= gate


def _sides(logp: Tensor, mask: Tensor, demo_mask: Tensor, **values: Tensor) -> tuple[Tensor, Tensor]:
    """Where own tokens and where tokens of demonstrations stand; the two are disjoint and together ``mask``."""
    check_mask(mask, logp)
    if demo_mask.dtype != torch.bool or demo_mask.shape != mask.shape:
        raise ValueError(
            f"demo_mask has dtype {demo_mask.dtype} and shape {tuple(demo_mask.shape)}; it must be torch.bool and "
            f"{tuple(mask.shape)} like mask (True = token of a demonstration)"
        )
    for name, value in values.items():
        # (N,) would be spread along the tokens, silently wherever N = T
        if value.ndim != mask.ndim:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, logp has {tuple(logp.shape)}; both must hold one value a "
                "token, so spread one value a sample by x[:, None].expand(N, T)"
            )
    return mask & ~demo_mask, mask & demo_mask


def _only(where: Tensor, x: Tensor) -> Tensor:
    """``x`` with 0 everywhere else: what a branch is not meant for reaches neither its value nor its gradient."""
    return raised(x).masked_fill(~where, 0.0)


def _merged(own: Tensor, own_loss: Tensor, demo: Tensor, demo_loss: Tensor) -> Tensor:
    return torch.where(own, own_loss, torch.where(demo, demo_loss, 0.0))


def _clipped(
    own: Tensor, logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    inputs = (_only(own, x) for x in (logp, old_logp, advantages))
    return clipped(*inputs, clip_low=clip_low, clip_high=clip_high)


def _probability(logp: Tensor) -> Tensor:
    """``exp(logp)``, kept from overflowing where the input is no log-prob."""
    return logp.clamp(max=LOG_RATIO_BOUND).exp()


def _shaped(logp: Tensor, shaping: float) -> Tensor:
    """``p / (p + shaping)`` without the division: finite for every log-prob, in value and gradient."""
    if not 0 < shaping < math.inf:
        raise ValueError(f"shaping is {shaping}; p / (p + shaping) needs a positive finite number, e.g. 0.1")
    return torch.sigmoid(logp - math.log(shaping))


def _chord_weight(logp: Tensor, weighting: ChordWeighting) -> Tensor:
    if weighting == "none":
        return torch.ones_like(logp)
    p = _probability(logp)
    # 1 - p by expm1: of a token with p near 1 the subtraction would leave rounding alone
    return p if weighting == "p" else p * -torch.expm1(logp.clamp(max=LOG_RATIO_BOUND))


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; the weight of a term must be 0 or a positive finite number")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; the share of the demonstrations must lie between 0 and 1")


def _check_steps(**steps: int) -> None:
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; a number of steps must be 0 or positive")
