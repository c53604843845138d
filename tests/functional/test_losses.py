"""PPO's clipped loss and the weights that correct for the engine; other losses in the files beside this one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rllava_pl.functional.losses import clipped, importance_weights
from tests.functional.cases import RATIO_RTOL, assert_near, cases, generator, matrix, slow_ratio

DTYPES = [torch.float32, torch.float64]
SETTINGS = [(0.2, 0.2, None), (0.2, 0.28, 3.0), (1.0, math.inf, None), (0.0, 0.0, 1.5)]


def slow_clipped(x: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    ratio = slow_ratio(x)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -advantage * dual) if dual is not None and advantage < 0 else loss


def slow_weights(old: Tensor, engine: Tensor, mask: Tensor, level: str, mode: str, cap: float) -> list[list[float]]:
    result = []
    for old_row, engine_row, kept in zip(old.tolist(), engine.tolist(), mask.tolist(), strict=True):
        differences = [0.0 if math.isnan(e) else o - e for o, e in zip(old_row, engine_row, strict=True)]
        total = sum(d for d, keep in zip(differences, kept, strict=True) if keep)
        row = []
        for difference, keep in zip(differences, kept, strict=True):
            chosen = total if level == "sequence" else difference
            weight = slow_ratio(chosen)
            bounded = min(weight, cap) if mode == "truncate" else weight * (weight <= cap)
            row.append(bounded if keep else 0.0)
        result.append(row)
    return result


def loss_and_gradient(x: float, advantage: float, **options: float) -> tuple[float, float]:
    logp = torch.tensor([x], requires_grad=True)
    loss = clipped(logp, torch.zeros(1), torch.tensor([advantage]), **options)
    return loss.item(), torch.autograd.grad(loss, logp)[0].item()


@pytest.mark.parametrize(
    ("x", "advantage", "options", "loss", "gradient"),
    [
        (0.5, 1, {}, -1.2, 0),  # ratio 1.65 is beyond 1.2: nothing more to gain
        (3.0, -1, {"dual_clip": 3.0}, 3.0, 0),  # ratio 20 on a bad token, bounded by 3
        (-0.5, -1, {}, 0.8, 0),  # ratio 0.61 is below 0.8: the bad token has been lowered enough
        (0.5, -1, {}, 1.648721, 1.648721),  # a bad token that became more likely is pushed back in full
        (30.0, -1, {}, 485165195.4, 0),  # e^20, where the ratio is bounded
        (-0.5, 1, {}, -0.606531, -0.606531),  # a good token that became less likely, too
    ],
)
def test_known_tokens_have_their_losses(x, advantage, options, loss, gradient):
    assert loss_and_gradient(x, advantage, **options) == pytest.approx((loss, gradient), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high", "dual"), SETTINGS)
def test_clipped_equals_a_slow_loop(low, high, dual, dtype):
    for logp, old, credit, _ in cases(dtype, seed=1):
        actual = clipped(logp, old, credit, clip_low=low, clip_high=high, dual_clip=dual)
        rows = zip(logp.tolist(), old.tolist(), credit.tolist(), strict=True)
        expected = [[slow_clipped(p - o, a, low, high, dual) for p, o, a in zip(*row, strict=True)] for row in rows]
        assert_near(actual, matrix(expected, logp), dtype=dtype, rtol=RATIO_RTOL[dtype])


@pytest.mark.parametrize(("low", "high", "dual"), SETTINGS[:3])
def test_gradients_are_those_of_finite_differences(low, high, dual):
    rng = generator(2)
    # off the kinks at ratio 0.8, 1.2 and 1.28, at the dual clip of 3 and at the bound of 20
    x = torch.tensor([-25.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.21, 0.4, 1.0, 1.5, 3.0, 25.0], dtype=torch.float64)
    logp = torch.randn(2, 12, generator=rng, dtype=torch.float64)
    credit = torch.tensor([[1.3], [-0.7]], dtype=torch.float64).expand(2, 12)
    old, leaf = logp - x, logp.requires_grad_()
    # the loss at |x| > 20 is 5e8, where finite differences only see that it is flat
    assert torch.autograd.gradcheck(
        lambda logp: clipped(logp, old, credit, clip_low=low, clip_high=high, dual_clip=dual), leaf, atol=1e-4
    )


@pytest.mark.parametrize(("low", "high", "dual"), SETTINGS)
def test_on_policy_gradient_is_minus_the_advantage(low, high, dual):
    credit = torch.tensor([2.0, -3.0, 0.0, 0.5])
    logp = torch.tensor([-1.0, -0.1, -7.0, 0.0], requires_grad=True)
    loss = clipped(logp, logp.detach(), credit, clip_low=low, clip_high=high, dual_clip=dual)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], -credit, rtol=0, atol=0)


def test_raising_a_good_token_lowers_the_loss():
    assert loss_and_gradient(0.01, 1)[0] < loss_and_gradient(0.0, 1)[0] < loss_and_gradient(-0.01, 1)[0]
    assert loss_and_gradient(0.01, -1)[0] > loss_and_gradient(0.0, -1)[0] > loss_and_gradient(-0.01, -1)[0]


def test_clipped_without_a_range_is_the_plain_ratio():
    x, credit = torch.linspace(-30, 30, 61, dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64)
    for advantage in credit:
        actual = clipped(x, torch.zeros_like(x), advantage.expand(61), clip_low=1.0, clip_high=math.inf)
        assert_near(actual, -advantage * x.clamp(-20, 20).exp(), dtype=torch.float64)


def test_tokens_are_independent():
    logp, old, credit, _ = list(cases(torch.float64, seed=3))[-1]
    expected = clipped(logp, old, credit)
    order = torch.randperm(logp.numel(), generator=generator(0))
    shuffled = clipped(*(x.flatten()[order] for x in (logp, old, credit)))
    torch.testing.assert_close(shuffled, expected.flatten()[order], rtol=0, atol=0)
    garbage = logp.clone()
    garbage[:, -1] = 1e30
    torch.testing.assert_close(clipped(garbage, old, credit)[:, :-1], expected[:, :-1], rtol=0, atol=0)
    assert clipped(garbage, old, credit).isfinite().all()


def test_half_precision_is_raised():
    logp, old = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.125], dtype=torch.float16)
    loss = clipped(logp, old, torch.tensor([1.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.125), rel=1e-6)
    weights = importance_weights(logp[None], old[None], torch.tensor([[True]]))
    assert weights.dtype == torch.float32
    assert weights.item() == pytest.approx(math.exp(0.125), rel=1e-6)


def test_wrong_clip_range_is_refused_by_name():
    zeros = torch.zeros(1)
    both = "both must be 0 or positive distances from 1$"
    with pytest.raises(ValueError, match=rf"^clip_low is -0\.1, clip_high is 0\.2; {both}"):
        clipped(zeros, zeros, zeros, clip_low=-0.1)
    with pytest.raises(ValueError, match=rf"^clip_low is 0\.2, clip_high is nan; {both}"):
        clipped(zeros, zeros, zeros, clip_high=math.nan)
    with pytest.raises(
        ValueError, match=r"^dual_clip is 1\.0; it bounds the ratio from above and must be larger than 1"
    ):
        clipped(zeros, zeros, zeros, dual_clip=1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    # differences 1, 0.5 (and -0.5, masked): e = 2.718 is above the cap of 2; together e^1.5 = 4.481689
    [
        ({}, [2, 1.648721, 0]),
        ({"mode": "mask"}, [0, 1.648721, 0]),
        ({"level": "sequence", "cap": 5.0}, [4.481689, 4.481689, 0]),
        ({"level": "sequence", "mode": "mask"}, [0.0, 0, 0]),
    ],
)
def test_known_differences_have_their_weights(options, expected):
    old, engine = torch.tensor([[-1.0, -1, -1]]), torch.tensor([[-2.0, -1.5, -0.5]])
    weights = importance_weights(old, engine, torch.tensor([[True, True, False]]), **options)
    torch.testing.assert_close(weights, torch.tensor([expected]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_equal_a_slow_loop(level, mode, dtype):
    rng = generator(4)
    for old, engine, _, mask in cases(dtype, seed=4):
        engine = engine.masked_fill(torch.rand(engine.shape, generator=rng) < 0.1, math.nan)
        actual = importance_weights(old, engine, mask, level=level, mode=mode, cap=3.0)
        assert_near(actual, matrix(slow_weights(old, engine, mask, level, mode, 3.0), old), dtype=dtype)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_detached_one_on_agreement_and_zero_where_masked(level):
    old = torch.randn(3, 4, generator=generator(5), requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4])
    weights = importance_weights(old, old.clone(), mask, level=level)
    assert not weights.requires_grad
    assert torch.equal(weights, mask.float())
    unreported = importance_weights(old, torch.full_like(old, math.nan), mask, level=level)
    assert torch.equal(unreported, mask.float())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_ignore_masked_positions_padding_and_order(level):
    for old, engine, garbage, mask in list(cases(torch.float64, seed=6))[::10]:
        expected = importance_weights(old, engine, mask, level=level, cap=1e9)
        loud = torch.where(mask, engine, 1e6 * garbage)
        order = torch.randperm(len(old), generator=generator(0))
        assert_near(importance_weights(old, loud, mask, level=level, cap=1e9), expected, dtype=torch.float64)
        shuffled = importance_weights(old[order], engine[order], mask[order], level=level, cap=1e9)
        assert_near(shuffled, expected[order], dtype=torch.float64)
        wide = [torch.cat([x, x], 1) for x in (old, loud)]
        padded = importance_weights(*wide, torch.cat([mask, mask & False], 1), level=level, cap=1e9)
        assert_near(padded[:, : old.shape[1]], expected, dtype=torch.float64)
        assert (padded[:, old.shape[1] :] == 0).all()


def test_wrong_weight_option_is_refused_by_name():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^level is 'row'; it must be one of 'token', 'sequence'$"):
        importance_weights(x, x, mask, level="row")
    with pytest.raises(ValueError, match=r"^mode is 'clip'; it must be one of 'truncate', 'mask'$"):
        importance_weights(x, x, mask, mode="clip")
    with pytest.raises(ValueError, match=r"^cap is 0; the largest weight must be positive$"):
        importance_weights(x, x, mask, cap=0)
    with pytest.raises(ValueError, match=r"^mask has shape \(1, 1\), the values have \(1, 2\); they must be equal$"):
        importance_weights(x, x, mask[:, 1:])
    with pytest.raises(ValueError, match=r"^mask has dtype torch.float32; it must be torch.bool"):
        importance_weights(x, x, mask.float())
