"""Losses in which tokens are independent: REINFORCE, CISPO, SAPO and the critic's."""

from __future__ import annotations

import math

import pytest
import torch

from rllava_pl.functional.losses import cispo, clipped, reinforce, sapo, value_clipped
from tests.functional.cases import RATIO_RTOL, TOLERANCE, assert_near, cases, matrix, rows, slow_ratio

DTYPES = [torch.float32, torch.float64]


def slow_sapo(x: float, advantage: float, positive: float, negative: float) -> float:
    tau = positive if advantage > 0 else negative
    return -advantage * 4 / tau / (1 + math.exp(-min(tau * (slow_ratio(x) - 1), 700)))


def slow_value(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def test_reinforce_with_advantage_one_is_the_negative_log_likelihood():
    logp = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]]), -1)
    ids = torch.tensor([2, 0])
    expected = torch.nn.functional.nll_loss(logp, ids, reduction="none")
    chosen = logp.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(reinforce(chosen, torch.ones(2)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reinforce_equals_a_slow_loop(dtype):
    for logp, _, credit, _ in cases(dtype, seed=10):
        expected = [[-a * p for p, a in zip(*row, strict=True)] for row in rows(logp, credit)]
        assert_near(reinforce(logp, credit), matrix(expected, logp), dtype=dtype)


def test_cispo_of_known_tokens():
    # ratio e^2 = 7.389 is cut to 5: -5 * 1 * -1 = 5. Ratio e^0.5 = 1.648721 stays: -1.648721 * -2 * -1 = -3.297443
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = cispo(logp, torch.tensor([-3.0, -1.5]), torch.tensor([1.0, -2.0]), clip_low=1.0, clip_high=4.0)
    torch.testing.assert_close(loss, torch.tensor([5.0, -3.297443]), atol=1e-6, rtol=1e-6)
    # the weight carries no gradient: -5 * 1 and -1.648721 * -2; the first token keeps one though it is out of range
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, torch.tensor([-5.0, 3.297443]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.2, 0.28), (1.0, math.inf), (0.0, 0.0)])
def test_cispo_equals_a_slow_loop(low, high, dtype):
    for logp, old, credit, _ in cases(dtype, seed=11):
        actual = cispo(logp, old, credit, clip_low=low, clip_high=high)
        expected = [
            [-min(max(slow_ratio(p - o), 1 - low), 1 + high) * a * p for p, o, a in zip(*row, strict=True)]
            for row in rows(logp, old, credit)
        ]
        assert_near(actual, matrix(expected, logp), dtype=dtype, rtol=RATIO_RTOL[dtype])


def test_sapo_of_known_tokens():
    # sigmoid(0.5) = 0.622459: -4 * 0.622459; sigmoid(0.525) = 0.628316: 4 / 1.05 * 0.628316; sigmoid(0): -2 * 4 * 0.5
    loss = sapo(torch.tensor([1.5, 1.5, 1.0]).log(), torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]))
    torch.testing.assert_close(loss, torch.tensor([-2.489837, 2.393585, -4.0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperatures", [(1.0, 1.05), (2.0, 0.3)])
def test_sapo_equals_a_slow_loop(temperatures, dtype):
    positive, negative = temperatures
    for logp, old, credit, _ in cases(dtype, seed=12):
        actual = sapo(logp, old, credit, temperature_positive=positive, temperature_negative=negative)
        expected = [
            [slow_sapo(p - o, a, positive, negative) for p, o, a in zip(*row, strict=True)]
            for row in rows(logp, old, credit)
        ]
        assert_near(actual, matrix(expected, logp), dtype=dtype)


def test_sapo_gradient_falls_on_both_sides_and_faster_for_bad_tokens():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)

    def weights(advantage: float) -> list[float]:
        logp = x.clone().requires_grad_()
        loss = sapo(logp, torch.zeros_like(x), torch.full_like(x, advantage))
        ratio = x.exp()  # d loss / d logp = ratio * d loss / d ratio
        return (torch.autograd.grad(loss.sum(), logp)[0] / ratio).abs().tolist()

    good, bad = weights(1.0), weights(-1.0)
    assert good[0] < good[1] < good[2] == 1.0 > good[3] > good[4]
    assert all(b < g for b, g in zip(bad[:2] + bad[3:], good[:2] + good[3:], strict=True))


def test_known_values_have_their_losses():
    # V = 1 is cut to 0.5: max(1, 2.25) / 2; V = 0.2 lies in range: 0.01 / 2
    loss = value_clipped(torch.tensor([1.0, 0.2]), torch.zeros(2), torch.tensor([2.0, 0.1]))
    torch.testing.assert_close(loss, torch.tensor([1.125, 0.005]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.5, 0.0, math.inf])
def test_values_equal_a_slow_loop(clip, dtype):
    for old, target, step, _ in cases(dtype, seed=13):
        value = old + step
        expected = [
            [slow_value(v, o, r, clip) for v, o, r in zip(*row, strict=True)] for row in rows(value, old, target)
        ]
        # bounds of size 5 are off by 5e-7 in fp32; an error in a difference counts twice in its square
        rtol = {torch.float32: 2e-6, torch.float64: 1e-10}[dtype]
        assert_near(value_clipped(value, old, target, clip=clip), matrix(expected, old), dtype=dtype, rtol=rtol)


def test_value_outside_the_clip_has_a_gradient_back_only():
    values = torch.tensor([1.0, 1.0, 0.3], requires_grad=True)
    # towards the return beyond the range: no gradient. Away from it: V - R. Within the range: V - R
    loss = value_clipped(values, torch.zeros(3), torch.tensor([2.0, -1.0, 1.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0, -0.7]))


def test_cispo_keeps_the_gradient_that_clipping_drops():
    logp, old, credit = torch.tensor([0.5], requires_grad=True), torch.zeros(1), torch.ones(1)
    kept = torch.autograd.grad(cispo(logp, old, credit, clip_low=0.2, clip_high=0.2), logp)[0]
    dropped = torch.autograd.grad(clipped(logp, old, credit), logp)[0]
    assert kept.item() == pytest.approx(-1.2, rel=TOLERANCE[torch.float32])
    assert dropped.item() == 0


def test_wrong_option_is_refused_by_name():
    zeros = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"^clip_low is -1, clip_high is 4; both must be 0 or positive distances from 1$"
    ):
        cispo(zeros, zeros, zeros, clip_low=-1, clip_high=4)
    with pytest.raises(ValueError, match=r"^temperature_positive is 0; it must be positive and finite$"):
        sapo(zeros, zeros, zeros, temperature_positive=0)
    with pytest.raises(ValueError, match=r"^temperature_negative is inf; it must be positive and finite$"):
        sapo(zeros, zeros, zeros, temperature_negative=math.inf)
    with pytest.raises(ValueError, match=r"^clip is -0\.5; it must be 0 or a positive distance from the old value$"):
        value_clipped(zeros, zeros, zeros, clip=-0.5)
    with pytest.raises(TypeError, match="clip_low"):
        cispo(zeros, zeros, zeros)  # no range that suits most runs: it must be given
