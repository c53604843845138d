"""Losses over rollouts and demonstrations, and the schedules between them."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rllava_pl.functional.demonstrations import (
    chord,
    chord_mu,
    hpt,
    hpt_gate,
    luffy,
    srft,
    uft,
    uft_hint_probability,
)
from rllava_pl.functional.losses import clipped
from tests.functional.cases import Mixed, assert_near, generator, grouped_rewards, matrix, mixed_cases

DTYPES = [torch.float32, torch.float64]
# x = logp - old as fp32 rounds it is off by up to 1e-6, which exp turns into a relative error
RTOL = {torch.float32: 4e-6, torch.float64: 1e-10}
LN2, LN5 = math.log(2), math.log(5)

Loss = Callable[..., Tensor]
VARIANTS: list[tuple[Loss, dict[str, object]]] = [
    (luffy, {}),
    (luffy, {"shaping": 0.5, "clip": 0.2}),
    (srft, {}),
    (srft, {"sft_scale": 0.2, "rl_scale": 0.7, "success_threshold": 0.5, "shaping": None}),
    (uft, {}),
    (uft, {"hint_coef": 0.3, "clip_low": 0.1, "clip_high": 0.28}),
    (hpt, {}),
    (hpt, {"sft_coef": 0.3, "rl_coef": 2.0, "clip_low": 1.0, "clip_high": math.inf}),
    (chord, {"mu": 0.25}),
    (chord, {"mu": 0.9, "weighting": "p", "clip_low": 0.1, "clip_high": 0.28}),
    (chord, {"mu": 0.5, "weighting": "none"}),
]
EVERY_VARIANT = pytest.mark.parametrize(("loss", "options"), VARIANTS)
EVERY_LOSS = pytest.mark.parametrize(
    ("loss", "options"), [(luffy, {}), (srft, {}), (uft, {}), (hpt, {}), (chord, {"mu": 0.25})]
)


def evaluate(loss: Loss, case: Mixed, options: dict[str, object]) -> Tensor:
    if loss is srft:
        inputs = case.logp, case.advantages, case.mask, case.demo, case.rewards, case.entropy
        return srft(*inputs, **options)
    return loss(case.logp, case.old, case.advantages, case.mask, case.demo, **options)


def value_and_gradient(loss: Loss, case: Mixed, options: dict[str, object]) -> tuple[Tensor, Tensor]:
    leaf = case.logp.clone().requires_grad_()
    value = evaluate(loss, case._replace(logp=leaf), options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@functools.cache
def drawn(dtype: torch.dtype) -> list[Mixed]:
    return list(mixed_cases(dtype, seed=1))


def blocks(cases: Iterable[Mixed]) -> Iterator[Mixed]:
    """Cases of one shape as one batch: rows are independent, and a hundred cases cost one call."""
    for _, block in itertools.groupby(cases, key=lambda case: case.logp.shape):
        yield Mixed(*map(torch.cat, zip(*block, strict=True)))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- a slow reference: one token, its loss and the derivative of that loss by its log-prob ---------------------------


class Token(NamedTuple):
    logp: float
    old: float
    advantage: float
    demo: bool
    reward: float
    entropy: float
    """Mean over the trainable tokens of its row."""


def slow_clipped(token: Token, low: float, high: float) -> tuple[float, float]:
    x = token.logp - token.old
    ratio = math.exp(min(max(x, -20.0), 20.0))
    free = -token.advantage * ratio
    held = -token.advantage * min(max(ratio, 1 - low), 1 + high)
    return max(free, held), free if free >= held and abs(x) <= 20 else 0.0


def slow_shaped(token: Token, shaping: float) -> tuple[float, float]:
    p = math.exp(token.logp)
    # d/dlogp = p * d/dp, and d/dp p / (p + s) = s / (p + s)^2
    return -token.advantage * p / (p + shaping), -token.advantage * p * shaping / (p + shaping) ** 2


def likelihood(token: Token, weight: float) -> tuple[float, float]:
    return -weight * token.logp, -weight


def slow_luffy(token: Token, shaping: float = 0.1, clip: float | None = None) -> tuple[float, float]:
    if token.demo:
        return slow_shaped(token, shaping)
    return slow_clipped(token, 1.0, math.inf) if clip is None else slow_clipped(token, clip, clip)


def slow_srft(
    token: Token,
    sft_scale: float = 0.5,
    rl_scale: float = 0.1,
    success_threshold: float = 1.0,
    shaping: float | None = 0.1,
) -> tuple[float, float]:
    if not token.demo:
        solved = token.reward >= success_threshold
        return likelihood(token, rl_scale * math.exp(token.entropy) if solved else -1.0)
    plain = -token.advantage * math.exp(token.logp)
    policy = (plain, plain) if shaping is None else slow_shaped(token, shaping)
    imitation = likelihood(token, sft_scale * math.exp(-token.entropy))
    return policy[0] + imitation[0], policy[1] + imitation[1]


def slow_uft(
    token: Token, hint_coef: float = 0.001, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[float, float]:
    return likelihood(token, hint_coef) if token.demo else slow_clipped(token, clip_low, clip_high)


def slow_hpt(
    token: Token, sft_coef: float = 1.0, rl_coef: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[float, float]:
    if token.demo:
        return likelihood(token, sft_coef)
    value, gradient = slow_clipped(token, clip_low, clip_high)
    return rl_coef * value, rl_coef * gradient


def slow_chord(
    token: Token, mu: float, weighting: str = "phi", clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[float, float]:
    if token.demo:
        p = math.exp(token.logp)
        return likelihood(token, mu * {"phi": p * (1 - p), "p": p, "none": 1.0}[weighting])
    value, gradient = slow_clipped(token, clip_low, clip_high)
    return (1 - mu) * value, (1 - mu) * gradient


SLOW = {luffy: slow_luffy, srft: slow_srft, uft: slow_uft, hpt: slow_hpt, chord: slow_chord}


def slow(loss: Loss, case: Mixed, options: dict[str, object]) -> tuple[Tensor, Tensor]:
    values, gradients = [], []
    per_row = zip(*(x.tolist() for x in case), strict=True)
    for logps, olds, credits, mask, demos, reward, entropies in per_row:
        kept = [entropy for entropy, keep in zip(entropies, mask, strict=True) if keep]
        entropy = sum(kept) / len(kept) if kept else 0.0
        tokens = [Token(*token, reward, entropy) for token in zip(logps, olds, credits, demos, strict=True)]
        pairs = [SLOW[loss](token, **options) if keep else (0.0, 0.0) for token, keep in zip(tokens, mask, strict=True)]
        values.append([value for value, _ in pairs])
        gradients.append([gradient for _, gradient in pairs])
    return matrix(values, case.logp), matrix(gradients, case.logp)


# --- values and gradients ---------------------------------------------------------------------------------------------


def known(p: float, options: dict[str, object], loss: Loss) -> list[float]:
    """A demonstration token of probability p without behaviour log-prob, an own one with log-ratio 0.5; A = 1."""
    logp, old = torch.tensor([[math.log(p), -1.0]]), torch.tensor([[math.nan, -1.5]])
    mask, demo = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    return loss(logp, old, torch.ones(1, 2), mask, demo, **options)[0].tolist()


@pytest.mark.parametrize(
    ("loss", "p", "options", "expected"),
    [
        (luffy, 0.5, {}, [-5 / 6, -math.exp(0.5)]),  # 0.5 / (0.5 + 0.1), and the ratio e^0.5 = 1.648721 unclipped
        (luffy, 0.5, {"clip": 0.2}, [-5 / 6, -1.2]),
        (uft, 0.5, {}, [0.001 * LN2, -1.2]),  # 0.001 * 0.693147, and the ratio clipped at 1.2
        (hpt, 0.5, {"sft_coef": 0.3}, [0.3 * LN2, -1.2]),
        (hpt, 0.5, {"rl_coef": 0.5}, [LN2, -0.6]),
        (chord, 0.2, {"mu": 0.25}, [0.25 * 0.2 * 0.8 * LN5, -0.75 * 1.2]),  # 0.04 * 1.609438 = 0.064378
        (chord, 0.2, {"mu": 0.25, "weighting": "p"}, [0.25 * 0.2 * LN5, -0.9]),
        (chord, 0.2, {"mu": 0.25, "weighting": "none"}, [0.25 * LN5, -0.9]),
        (chord, 0.2, {"mu": 0}, [0, -1.2]),
        (chord, 0.2, {"mu": 1}, [0.16 * LN5, 0]),
    ],
)
def test_known_tokens_have_their_losses(loss, p, options, expected):
    assert known(p, options, loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("shaping", "demonstration"),
    # mean entropy of the row is 1, p = 0.5: 0.5 * e^-1 * ln 2 = 0.127497, minus 0.5 / 0.6 or minus 0.5
    [(0.1, 0.127497 - 0.833333), (None, 0.127497 - 0.5)],
)
def test_known_tokens_have_their_srft_losses(shaping, demonstration):
    logp = torch.tensor([[math.log(0.5), -1.0], [-2.0, -1.0]])
    mask, demo = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[True, False], [False, False]])
    credit, rewards = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([1.0, 0.9])
    entropy = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    actual = srft(logp, credit, mask, demo, rewards, entropy, shaping=shaping)
    # row 0 is solved: -0.1 * e^1 * -1 = 0.271828; row 1 with 0.9 < 1 failed and holds its log-probs
    torch.testing.assert_close(actual, torch.tensor([[demonstration, 0.271828], [-2, -1]]), atol=1e-6, rtol=0)


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_a_slow_loop(loss, options, dtype):
    for case in blocks(drawn(dtype)):
        for actual, expected in zip(value_and_gradient(loss, case, options), slow(loss, case, options), strict=True):
            assert_near(actual, expected, dtype=dtype, rtol=RTOL[dtype])


def test_cases_have_every_kind_of_row():
    kinds = set()
    for case in drawn(torch.float64):
        for kept, demo in zip(case.mask, case.demo & case.mask, strict=True):
            full, share = kept.all().item(), demo.sum().item() / max(kept.sum().item(), 1)
            kinds.add((kept.any().item(), full, share if share in (0, 1) else "some"))
    assert kinds == {(False, False, 0), *((True, full, share) for full in (True, False) for share in (0, "some", 1))}


@pytest.mark.parametrize(
    ("loss", "options"),
    [variant for variant in VARIANTS if variant[1].get("weighting", "phi") == "none"] + VARIANTS[:8],
)
def test_gradients_are_those_of_finite_differences(loss, options):
    rng = generator(2)
    # off the kinks at the ratios 0.8, 0.9, 1.2 and 1.28
    x = torch.tensor([-3.0, -1.0, -0.3, -0.05, 0.0, 0.1, 0.22, 0.4, 1.0, 2.0], dtype=torch.float64).expand(4, 10)
    logp = -3 * torch.rand(4, 10, generator=rng, dtype=torch.float64)
    credit = torch.tensor([[1.3], [-0.7], [0.4], [-2.0]], dtype=torch.float64).expand(4, 10)
    mask, demo = (torch.rand(4, 10, generator=rng) < share for share in (0.8, 0.4))
    rewards, entropy = torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), torch.rand(4, 10, generator=rng).double()
    case = Mixed(logp, logp - x, credit, mask, demo, rewards, entropy)
    assert torch.autograd.gradcheck(
        lambda leaf: evaluate(loss, case._replace(logp=leaf), options), logp.clone().requires_grad_(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("weighting", "weight"), [("phi", 0.16), ("p", 0.2), ("none", 1.0)])
def test_weights_of_chord_are_detached(weighting, weight):
    logp = torch.tensor([[math.log(0.2)]], dtype=torch.float64, requires_grad=True)
    everywhere = torch.tensor([[True]])
    loss = chord(logp, logp.detach(), torch.ones(1, 1), everywhere, everywhere, mu=0.5, weighting=weighting)
    # d/dlogp of -mu * w * logp with w held: -mu * w; through w it would be larger by -mu * w' * logp
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(-0.5 * weight, rel=1e-12)


def test_phi_keeps_its_precision_for_probabilities_near_one():
    logp = torch.tensor([[-1e-6]])
    everywhere = torch.tensor([[True]])
    loss = chord(logp, logp, torch.ones(1, 1), everywhere, everywhere, mu=1.0)
    # p * (1 - p) * 1e-6 with 1 - p = 1e-6; as 1 - exp(logp) fp32 would be off by 5 percent
    assert loss.item() == pytest.approx(1e-12, rel=1e-5, abs=0)


@pytest.mark.parametrize("options", [{}, {"shaping": None}])
def test_entropy_of_srft_is_detached(options):
    rng = generator(3)
    logits = torch.randn(4, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    distribution = torch.distributions.Categorical(logits=logits)
    logp, entropy = distribution.logits[..., 2], distribution.entropy()
    mask, demo = (torch.rand(4, 5, generator=rng) < 0.7 for _ in range(2))
    credit, rewards = torch.randn(4, 5, generator=rng).double(), torch.tensor([1.0, 0.0, 1.0, 0.0])
    through, held = (
        torch.autograd.grad(srft(logp, credit, mask, demo, rewards, h, **options).sum(), logits, retain_graph=True)[0]
        for h in (entropy, entropy.detach())
    )
    assert through.abs().sum() > 0
    assert_same((through,), (held,))


@EVERY_LOSS
def test_demonstrations_become_more_likely(loss, options):
    for case in drawn(torch.float64)[::20]:
        case = case._replace(advantages=case.advantages.abs() + 0.1, logp=case.logp.clamp(-9, -0.1))
        _, gradient = value_and_gradient(loss, case, options)
        assert (gradient[case.mask & case.demo] < 0).all()


def test_own_tokens_of_srft_follow_success():
    logp, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    case = Mixed(logp, logp, logp, mask, ~mask, torch.tensor([1.0, 0.999]), torch.zeros(2, 3))
    _, gradient = value_and_gradient(srft, case, {})
    torch.testing.assert_close(gradient, torch.tensor([[-0.1], [1.0]]).expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_reward_at_the_threshold_counts_as_solved(dtype):
    # 0.9 rounds down in fp32 and up in bf16; the threshold must round with it
    rewards, everywhere = torch.tensor([0.9], dtype=dtype), torch.tensor([[True]])
    logp = torch.tensor([[-1.0]])
    loss = srft(logp, logp, everywhere, ~everywhere, rewards, torch.zeros(1, 1), success_threshold=0.9)
    assert loss.item() == pytest.approx(0.1)
    assert hpt_gate(rewards, torch.tensor([4]), success_threshold=0.9).tolist() == [False]


@pytest.mark.parametrize(
    ("loss", "options", "scale"),
    [(luffy, {"clip": 0.2}, 1.0), (uft, {}, 1.0), (hpt, {"rl_coef": 0.5}, 0.5), (chord, {"mu": 0.3}, 0.7)],
)
def test_loss_without_demonstrations_is_the_clipped_loss(loss, options, scale):
    for case in drawn(torch.float64)[::10]:
        case = case._replace(demo=case.demo & False)
        expected = scale * clipped(case.logp, case.old, case.advantages).where(case.mask, 0.0)
        assert_near(evaluate(loss, case, options), expected, dtype=torch.float64)


# --- invariances ------------------------------------------------------------------------------------------------------


@EVERY_VARIANT
@pytest.mark.parametrize("garbage", [1e30, -1e30, math.nan, math.inf])
def test_inputs_that_a_branch_does_not_read_have_no_influence(loss, options, garbage):
    for case in drawn(torch.float32)[::100]:
        own, demo = case.mask & ~case.demo, case.mask & case.demo
        credit = {luffy: case.mask, srft: demo}.get(loss, own)
        loud = Mixed(
            case.logp.masked_fill(~case.mask, garbage),
            case.old.masked_fill(~own, garbage),
            case.advantages.masked_fill(~credit, garbage),
            case.mask,
            case.demo ^ ~case.mask,
            case.rewards.masked_fill(~own.any(1), garbage),
            case.entropy.masked_fill(~case.mask, garbage),
        )
        expected = value_and_gradient(loss, case, options)
        # one at a time as well: what is NaN in one place may hide it in another
        for changed in (loud, *(case._replace(**{name: getattr(loud, name)}) for name in Mixed._fields)):
            value, gradient = value_and_gradient(loss, changed, options)
            assert_same((value, gradient), expected)
            assert (value[~case.mask] == 0).all() and (gradient[~case.mask] == 0).all()


@EVERY_VARIANT
def test_sample_order_and_padding_have_no_influence(loss, options):
    for case in drawn(torch.float64)[::20]:
        value, gradient = value_and_gradient(loss, case, options)
        order = torch.randperm(len(case.logp), generator=generator(0))
        shuffled = Mixed(*(x[order] for x in case))
        for actual, expected in zip(value_and_gradient(loss, shuffled, options), (value, gradient), strict=True):
            assert_near(actual, expected[order], dtype=torch.float64)
        wide = Mixed(*(torch.cat([x, x], 1) if x.ndim == 2 else x for x in case))
        wide = wide._replace(mask=torch.cat([case.mask, case.mask & False], 1))
        for actual, expected in zip(value_and_gradient(loss, wide, options), (value, gradient), strict=True):
            assert_near(actual[:, : value.shape[1]], expected, dtype=torch.float64)
            assert (actual[:, value.shape[1] :] == 0).all()


@EVERY_VARIANT
def test_inputs_are_unchanged(loss, options):
    for case in drawn(torch.float64)[::100]:
        before = Mixed(*(x.clone() for x in case))
        value_and_gradient(loss, case, options)
        assert_same(tuple(case), tuple(before))


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_log_probs_and_entropies_stay_finite(loss, options, dtype):
    levels = torch.tensor([-1e6, -200.0, -89.0, -20.0, -1e-30, 0.0, 1e-3, 200.0], dtype=dtype)
    logp, old = torch.cartesian_prod(levels, levels).T.reshape(2, 1, -1).repeat_interleave(4, 1)
    credit = torch.tensor([[3.0], [-3.0], [3.0], [-3.0]], dtype=dtype).expand_as(logp)
    demo = torch.tensor([[True], [True], [False], [False]]).expand_as(logp)
    for entropy in (0.0, 12.0, 1e4):
        mask, rewards = torch.ones_like(demo), torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype)
        case = Mixed(logp, old, credit, mask, demo, rewards, torch.full_like(logp, entropy))
        assert all(x.isfinite().all() for x in value_and_gradient(loss, case, options))


@EVERY_LOSS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_batch_without_trainable_tokens_is_zero_and_connected(loss, options, shape):
    zeros, nowhere = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    case = Mixed(zeros, zeros, zeros, nowhere, ~nowhere, zeros.new_ones(shape[0]), zeros)
    value, gradient = value_and_gradient(loss, case, options)
    assert value.shape == gradient.shape == shape
    assert (value == 0).all() and (gradient == 0).all()


@EVERY_LOSS
def test_precision_is_that_of_the_finest_input_and_at_least_single(loss, options):
    case = next(case for case in drawn(torch.float64) if case.logp.shape == (3, 4))
    half = Mixed(*(x if x.dtype == torch.bool else x.bfloat16() for x in case))
    single = Mixed(*(x.float() if x.dtype == torch.bfloat16 else x for x in half))
    value = evaluate(loss, half, options)
    assert value.dtype == torch.float32
    assert_same((value,), (evaluate(loss, single, options),))
    mixed = case._replace(advantages=case.advantages.float(), rewards=case.rewards.float())
    assert evaluate(loss, mixed, options).dtype == torch.float64


# --- schedules and the gate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "probability"),
    # 0.5 + 0.45 * cos(pi * (step + 1) / 300): cos(pi / 300) = 0.99994517, cos(pi / 2) = 0, cos(pi) = -1
    [(0, 0.949975), (149, 0.5), (299, 0.05), (300, 0), (10_000, 0)],
)
def test_known_hint_probabilities(step, probability):
    assert uft_hint_probability(step, hint_steps=300) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "mu"),
    # half of the warm-up; its end; half of the decay, (0.5 + 0.02) / 2; its end; beyond
    [(0, 0), (100, 0.25), (200, 0.5), (400, 0.26), (600, 0.02), (10_000, 0.02)],
)
def test_known_shares_of_demonstrations(step, mu):
    actual = chord_mu(step, warmup_steps=200, decay_steps=400, peak=0.5, valley=0.02)
    assert actual == pytest.approx(mu, abs=1e-12)


def test_schedules_equal_another_form_of_the_cosine():
    # (1 + cos(pi x)) / 2 = cos(pi x / 2)^2
    for step, length, low, high in random_schedules(seed=10):
        x = (step + 1) / max(length, 1)
        expected = low + (high - low) * math.cos(math.pi * x / 2) ** 2 if step < length else 0.0
        assert uft_hint_probability(step, hint_steps=length, low=low, high=high) == pytest.approx(expected, abs=1e-12)


def test_share_of_demonstrations_rises_and_falls():
    for step, length, valley, peak in random_schedules(seed=11):
        for warmup in (0, 1, length // 2, length):
            decay = length - warmup
            actual = chord_mu(step, warmup_steps=warmup, decay_steps=decay, peak=peak, valley=valley)
            expected = valley
            if step < warmup:
                expected = peak / warmup * step
            elif step < length:
                expected += (peak - valley) * math.cos(math.pi * (step - warmup) / decay / 2) ** 2
            assert actual == pytest.approx(expected, abs=1e-12)


def random_schedules(seed: int) -> list[tuple[int, int, float, float]]:
    """1,000 times a step, a number of steps and two ordered shares."""
    rng = generator(seed)
    steps = torch.randint(0, 60, (1000,), generator=rng).tolist()
    lengths = torch.randint(1, 50, (1000,), generator=rng).tolist()
    shares = torch.rand((1000, 2), generator=rng, dtype=torch.float64).sort(1).values.T.tolist()
    return list(zip(steps, lengths, *shares, strict=True))


def test_phases_of_a_schedule_may_be_empty():
    assert [uft_hint_probability(step, hint_steps=0) for step in (0, 1)] == [0, 0]
    assert chord_mu(0, warmup_steps=0, decay_steps=4, peak=0.5, valley=0.1) == 0.5
    assert [chord_mu(step, warmup_steps=2, decay_steps=0, peak=0.5, valley=0.1) for step in range(4)] == [
        0.0,
        0.25,
        0.1,
        0.1,
    ]
    assert [chord_mu(step, warmup_steps=0, decay_steps=0, peak=0.5, valley=0.1) for step in (0, 1)] == [0.1, 0.1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("threshold", "gate"), [(1.0, 0), (0.05, 0), (0.5, 2)])
def test_gate_equals_a_slow_loop(threshold, gate, dtype):
    for rewards, group in grouped_rewards(dtype, seed=12):
        rows = list(zip(rewards.tolist(), group.tolist(), strict=True))
        expected = [sum(r >= threshold for r, other in rows if other == own) <= gate for _, own in rows]
        actual = hpt_gate(rewards, group, success_threshold=threshold, gate=gate)
        assert actual.dtype == torch.bool
        assert actual.tolist() == expected


def test_default_gate_uses_demonstrations_of_unsolved_prompts():
    # none solved; one of two solved; 0.9 is not solved
    rewards, group = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.9]), torch.tensor([3, 3, 1, 1, 2])
    assert hpt_gate(rewards, group).tolist() == [True, True, False, False, True]
    assert hpt_gate(rewards, group, gate=1).tolist() == [True] * 5
    assert hpt_gate(rewards[:0], group[:0]).shape == (0,)


# --- refusals ---------------------------------------------------------------------------------------------------------

TOKEN, EVERYWHERE = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (luffy, {"shaping": 0}, r"shaping is 0; p / \(p \+ shaping\) needs a positive finite number, e.g. 0.1"),
        (luffy, {"shaping": math.nan}, r"shaping is nan; p / \(p \+ shaping\) needs a positive finite number"),
        (srft, {"shaping": -1}, r"shaping is -1; p / \(p \+ shaping\) needs a positive finite number"),
        (luffy, {"clip": -0.1}, r"clip is -0.1; it must be 0 or a positive distance of the ratio from 1, or None"),
        (srft, {"sft_scale": -1}, "sft_scale is -1; the weight of a term must be 0 or a positive finite number"),
        (srft, {"rl_scale": math.inf}, "rl_scale is inf; the weight of a term must be 0 or a positive finite number"),
        (uft, {"hint_coef": -1}, "hint_coef is -1; the weight of a term"),
        (hpt, {"sft_coef": -1}, "sft_coef is -1; the weight of a term"),
        (hpt, {"rl_coef": -1}, "rl_coef is -1; the weight of a term"),
        (chord, {"mu": 1.5}, "mu is 1.5; the share of the demonstrations must lie between 0 and 1$"),
        (chord, {"mu": -0.1}, "mu is -0.1; the share of the demonstrations must lie between 0 and 1$"),
        (chord, {"mu": 0.5, "weighting": "sqrt"}, "weighting is 'sqrt'; it must be one of 'phi', 'p', 'none'$"),
        (uft, {"clip_low": -1.0}, "clip_low is -1.0, clip_high is 0.2; both must be 0 or positive distances from 1$"),
        (hpt, {"clip_high": -1.0}, "clip_low is 0.2, clip_high is -1.0; both must be 0 or positive distances from 1$"),
    ],
)
def test_wrong_option_is_refused_by_name(loss, options, message):
    case = Mixed(TOKEN, TOKEN, TOKEN, EVERYWHERE, EVERYWHERE, torch.zeros(1), TOKEN)
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate(loss, case, options)


@EVERY_LOSS
def test_wrong_shape_is_refused_by_name(loss, options):
    case = Mixed(TOKEN, TOKEN, TOKEN, EVERYWHERE, EVERYWHERE, torch.zeros(1), TOKEN)
    with pytest.raises(ValueError, match=r"^mask has dtype torch.float32; it must be torch.bool"):
        evaluate(loss, case._replace(mask=TOKEN), options)
    with pytest.raises(
        ValueError,
        match=r"^demo_mask has dtype torch.float32 and shape \(1, 2\); it must be torch.bool and \(1, 2\) like mask",
    ):
        evaluate(loss, case._replace(demo=TOKEN), options)
    with pytest.raises(ValueError, match=r"^demo_mask has dtype torch.bool and shape \(1, 1\); it must be"):
        evaluate(loss, case._replace(demo=EVERYWHERE[:, 1:]), options)
    with pytest.raises(
        ValueError,
        match=r"^advantages has shape \(2,\), logp has \(1, 2\); both must hold one value a token, so spread",
    ):
        evaluate(loss, case._replace(advantages=TOKEN[0]), options)


def test_srft_refuses_wrong_shapes_of_rewards_and_entropies():
    with pytest.raises(
        ValueError, match=r"^rewards_N has shape \(2,\), mask \(1, 2\); they must be \(N,\) and \(N, T\)"
    ):
        srft(TOKEN, TOKEN, EVERYWHERE, EVERYWHERE, torch.zeros(2), TOKEN)
    with pytest.raises(ValueError, match=r"^mask has shape \(1, 2\), the values have \(1,\); they must be equal"):
        srft(TOKEN, TOKEN, EVERYWHERE, EVERYWHERE, torch.zeros(1), torch.zeros(1))


def test_wrong_schedule_or_gate_is_refused_by_name():
    steps = "a number of steps must be 0 or positive$"
    with pytest.raises(ValueError, match=f"^step is -1; {steps}"):
        uft_hint_probability(-1, hint_steps=3)
    with pytest.raises(ValueError, match=f"^hint_steps is -3; {steps}"):
        uft_hint_probability(0, hint_steps=-3)
    with pytest.raises(
        ValueError, match=r"^low is 0.9, high is 0.1; probabilities must satisfy 0 <= low <= high <= 1$"
    ):
        uft_hint_probability(0, hint_steps=3, low=0.9, high=0.1)
    phases = {"warmup_steps": 2, "decay_steps": 2, "peak": 0.5, "valley": 0.1}
    with pytest.raises(ValueError, match=f"^step is -1; {steps}"):
        chord_mu(-1, **phases)
    with pytest.raises(ValueError, match=f"^warmup_steps is -1; {steps}"):
        chord_mu(0, **phases | {"warmup_steps": -1})
    with pytest.raises(ValueError, match=f"^decay_steps is -1; {steps}"):
        chord_mu(0, **phases | {"decay_steps": -1})
    with pytest.raises(ValueError, match=r"^peak is 1.5; the share of the demonstrations must lie between 0 and 1$"):
        chord_mu(0, **phases | {"peak": 1.5})
    with pytest.raises(ValueError, match=r"^valley is -0.5; the share of the demonstrations must lie between 0 and 1$"):
        chord_mu(0, **phases | {"valley": -0.5})
    with pytest.raises(
        ValueError, match=r"^gate is -1; it counts solved samples of a group and must be 0 or positive$"
    ):
        hpt_gate(torch.zeros(2), torch.zeros(2, dtype=torch.int64), gate=-1)
    with pytest.raises(ValueError, match=r"^group_N has shape \(3,\), the values have \(2,\); both must be \(N,\)"):
        hpt_gate(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("loss", SLOW)
def test_defaults_are_those_of_the_reference(loss):
    published, reference = (
        {name: p.default for name, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
        for f in (loss, SLOW[loss])
    )
    assert published == reference
