"""The loss of preference pairs."""

from __future__ import annotations

import math

import pytest
import torch

from rllava_pl.functional.preference import dpo
from tests.functional.cases import assert_near, generator, pairs

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}
SETTINGS = [{}, {"beta": 0.5, "label_smoothing": 0.1}, {"beta": 2.0, "label_smoothing": 0.5}]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def slow_dpo(
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    beta: float = 0.1,
    label_smoothing: float = 0,
) -> tuple[float, float, float, float]:
    """Loss, both rewards, and the derivative of the loss by the chosen log-prob."""
    won, lost = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    h = won - lost
    loss = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
    return loss, won, lost, beta * (label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h))


def test_known_pair_has_its_loss_and_rewards():
    # h = 0.5 * ((-10 + 11) - (-12 + 11)) = 1, -log sigmoid(1) = ln(1 + 1 / e) = 0.313262
    chosen, rejected, reference = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0))
    loss, won, lost = dpo(chosen, rejected, reference, reference, beta=0.5)
    assert [x.item() for x in (loss, won, lost)] == pytest.approx([0.313262, 0.5, -0.5], abs=1e-6)
    # a tenth of the labels flipped: 0.9 * 0.313262 + 0.1 * ln(1 + e) = 0.281935 + 0.131326
    smoothed, _, _ = dpo(chosen, rejected, reference, reference, beta=0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.413262, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SETTINGS)
def test_values_and_gradients_equal_a_slow_loop(options, dtype):
    # an fp32 log-prob of -3000 is exact to 1e-4, and so is a difference: the reference starts from the differences
    for case in pairs(dtype, seed=1):
        chosen, rejected = (x.clone().requires_grad_() for x in case[:2])
        loss, *rewards = dpo(chosen, rejected, *case[2:], **options)
        differences = ((case[0] - case[2]).tolist(), (case[1] - case[3]).tolist())
        rows = [slow_dpo(won, lost, 0.0, 0.0, **options) for won, lost in zip(*differences, strict=True)]
        expected = torch.tensor(rows, dtype=torch.float64).T
        gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
        actual = (loss.detach(), *rewards, *gradients)
        for x, y in zip(actual, (*expected, -expected[3]), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert x.dtype == dtype


@pytest.mark.parametrize("options", SETTINGS)
def test_gradients_are_those_of_finite_differences(options):
    inputs = [torch.randn(6, generator=generator(seed), dtype=torch.float64, requires_grad=True) for seed in range(4)]
    assert torch.autograd.gradcheck(lambda *x: dpo(*x, **options)[0], inputs, atol=1e-5, rtol=0)


def test_loss_at_the_reference_is_ln_2_and_raises_the_margin():
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-30.0, -5.0))
    loss, won, lost = dpo(chosen, rejected, chosen.detach(), rejected.detach())
    assert loss.item() == pytest.approx(math.log(2))
    assert won.item() == lost.item() == 0
    # beta * sigmoid(0) = 0.05
    assert [x.item() for x in torch.autograd.grad(loss, (chosen, rejected))] == pytest.approx([-0.05, 0.05])


def test_rewards_are_detached():
    logps = [torch.randn(3, generator=generator(seed), requires_grad=True) for seed in range(4)]
    loss, won, lost = dpo(*logps)
    assert (loss.requires_grad, won.requires_grad, lost.requires_grad) == (True, False, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_margins_are_finite(dtype):
    leaf = torch.tensor([-1e6, -1e4, -0.0, 1e4, 1e6], dtype=dtype, requires_grad=True)
    zeros = torch.zeros_like(leaf)
    for options in SETTINGS:
        loss, _, _ = dpo(leaf, zeros, zeros, zeros, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isfinite().all() and gradient.isfinite().all()
    # linear, not capped: a wrong margin of 1e6 * beta costs itself, with slope beta
    loss, _, _ = dpo(leaf, zeros, zeros, zeros)
    assert loss[0].item() == pytest.approx(1e5, rel=1e-6)
    assert torch.autograd.grad(loss.sum(), leaf)[0][0].item() == pytest.approx(-0.1)


def test_pairs_are_independent_and_unchanged():
    case = list(pairs(torch.float64, seed=2))[-1]
    before, expected = [x.clone() for x in case], dpo(*case)
    assert all(torch.equal(x, y) for x, y in zip(case, before, strict=True))
    order = torch.randperm(len(case[0]), generator=generator(0))
    for actual, x in zip(dpo(*(x[order] for x in case)), expected, strict=True):
        assert_near(actual, x[order], dtype=torch.float64)
    assert [x.shape for x in dpo(*(x[:0] for x in case))] == [(0,)] * 3


def test_half_precision_is_raised():
    case = [x.bfloat16() for x in next(pairs(torch.float64, seed=3))]
    for actual, expected in zip(dpo(*case), dpo(*(x.float() for x in case)), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_wrong_option_or_shape_is_refused_by_name():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^beta is 0; it must be a positive finite number, e.g. 0.1$"):
        dpo(x, x, x, x, beta=0)
    with pytest.raises(
        ValueError,
        match=r"^label_smoothing is 0.6; it must lie between 0 and 0.5, above it the rejected one would win$",
    ):
        dpo(x, x, x, x, label_smoothing=0.6)
    with pytest.raises(ValueError, match=r"^label_smoothing is -0.1; it must lie between 0 and 0.5"):
        dpo(x, x, x, x, label_smoothing=-0.1)
    shapes = r"chosen \(2,\), rejected \(2,\), ref_chosen \(2, 1\), ref_rejected \(2,\)"
    with pytest.raises(ValueError, match=rf"^log-probs have the shapes {shapes}; all four must be \(N,\)"):
        dpo(x, x, x.unsqueeze(1), x)
