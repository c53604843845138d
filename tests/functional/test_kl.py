"""KL estimators and the controllers of the KL coefficient."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from rllava_pl.functional.kl import AdaptiveKLController, FixedKLController, KLEstimator, kl_estimate
from tests.functional.cases import assert_near, cases, generator, matrix

ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)


def slow_value(d: float, estimator: str) -> float:
    name = estimator.removesuffix("+")
    return {"k1": d, "abs": abs(d), "k2": d * d / 2, "k3": slow_k3(-d)}[name]


def slow_k3(u: float) -> float:
    return math.expm1(u) - u if u <= 80 else math.exp(80) * (1 + u - 80) - 1 - u


def slow_gradient(d: float, estimator: str) -> float:
    if estimator.endswith("+") or estimator == "k2":
        return d
    return {"k1": 1.0, "abs": (d > 0) - (d < 0), "k3": 1 - math.exp(min(-d, 80))}[estimator]


def value_and_gradient(logp: torch.Tensor, ref: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logp.clone().requires_grad_()
    value = kl_estimate(leaf, ref, estimator)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    # d = -5: |d| = 5, d^2 / 2 = 12.5, e^5 + d - 1 = 148.413159 - 6, and 1 - e^5
    [
        ("k1", -5, 1),
        ("abs", 5, -1),
        ("k2", 12.5, -5),
        ("k3", 142.413159, -147.413159),
        ("k1+", -5, -5),
        ("abs+", 5, -5),
        ("k3+", 142.413159, -5),
    ],
)
def test_values_and_gradients_at_minus_five(estimator, value, gradient):
    actual = value_and_gradient(torch.tensor([[-5.0]]), torch.tensor([[0.0]]), estimator)
    assert [x.item() for x in actual] == pytest.approx([value, gradient], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients_equal_a_slow_loop(estimator, dtype):
    for logp, ref, _, _ in cases(dtype, seed=1):
        # the difference as the dtype rounds it: exp would turn its last bit into a visible relative error
        differences = (logp - ref).tolist()
        value, gradient = value_and_gradient(logp, ref, estimator)
        expected = [[slow_value(d, estimator) for d in row] for row in differences]
        assert_near(value, matrix(expected, logp), dtype=dtype)
        expected = [[slow_gradient(d, estimator) for d in row] for row in differences]
        assert_near(gradient, matrix(expected, logp), dtype=dtype)


@pytest.mark.parametrize("u", [79.0, 80.0, 80.5, 88.0, 120.0, 1000.0])
def test_k3_continues_linearly_and_keeps_its_gradient(u):
    value, gradient = value_and_gradient(torch.tensor([-u]), torch.tensor([0.0]), "k3")
    slope = math.exp(min(u, 80))
    expected = slope * (1 + max(u - 80, 0)) - 1 - u
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.item() == pytest.approx(1 - slope, rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_of_distant_policies_are_finite(estimator):
    value, gradient = value_and_gradient(torch.tensor([-5000.0, 0.0]), torch.tensor([0.0, -5000.0]), estimator)
    assert value.isfinite().all()
    assert (gradient.isfinite() & (gradient != 0)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_divergence(estimator):
    logp = torch.tensor([[-1.5, -0.1, 0.0]])
    assert (kl_estimate(logp, logp, estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_gradients_are_those_of_finite_differences(estimator):
    rng = generator(2)
    logp = torch.randn(3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    ref = logp.detach() + torch.where(torch.rand(3, 4, generator=rng) < 0.5, 0.7, -0.9)  # away from the kink of abs
    assert torch.autograd.gradcheck(lambda logp: kl_estimate(logp, ref, estimator), logp)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_is_that_of_the_stated_divergence(estimator):
    rng = generator(3)
    logits = torch.randn(7, generator=rng, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, generator=rng, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    forward = (logp.exp() * (logp - ref)).sum()
    backward = (ref.exp() * (ref - logp)).sum()
    # the exact expectation over actions drawn from the policy; the draw itself is not differentiated
    expected = (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum()
    actual, kl, reverse = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, forward, backward))
    if estimator in ("k2", "k1+", "abs+", "k3+"):
        torch.testing.assert_close(actual, kl)
    elif estimator == "k3":
        torch.testing.assert_close(actual, reverse)
    elif estimator == "k1":
        torch.testing.assert_close(actual, torch.zeros_like(actual))
    if estimator != "k2" and not estimator.startswith("abs"):
        torch.testing.assert_close(expected.detach(), forward.detach())  # k1 and k3 are unbiased


def test_half_precision_is_raised():
    logp, ref = torch.tensor([-5.0], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.float16)
    value = kl_estimate(logp, ref)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(math.exp(4) - 5, rel=1e-6)


def test_unknown_estimator_is_refused_by_name():
    allowed = r"'k1', 'abs', 'k2', 'k3', 'k1\+', 'abs\+', 'k3\+'"
    for name in ("k4", "k2+"):
        with pytest.raises(ValueError, match=f"^estimator is '{name[:2]}.*'; it must be one of {allowed}$"):
            kl_estimate(torch.zeros(1), torch.zeros(1), name)


def test_adaptive_coefficient_follows_the_observed_kl():
    controller = AdaptiveKLController(0.001, 0.1, 10000)
    controller.update(0.3, 512)  # error 2, clipped to 0.2: 0.001 * (1 + 0.2 * 0.0512)
    assert controller.coef == pytest.approx(0.00101024, rel=1e-12)
    controller.update(0.09, 512)  # error -0.1: times 1 - 0.1 * 0.0512
    assert controller.coef == pytest.approx(0.00101024 * 0.99488, rel=1e-12)
    controller.update(-1.0, 10000)  # k1 may be negative; error -11, clipped to -0.2
    assert controller.coef == pytest.approx(0.00101024 * 0.99488 * 0.8, rel=1e-12)


def test_coefficient_is_the_whole_state_of_a_controller():
    first, second = AdaptiveKLController(0.1, 0.1, 100), AdaptiveKLController(7.0, 0.1, 100)
    first.update(0.15, 20)
    second.coef = first.coef
    first.update(0.02, 30)
    second.update(0.02, 30)
    assert first.coef == second.coef


def test_fixed_coefficient_is_constant():
    controller = FixedKLController(0.04)
    controller.update(9.0, 10**6)
    assert controller.coef == 0.04


def test_wrong_controller_option_is_refused():
    kl = "a KL coefficient must be 0 or positive$"
    with pytest.raises(ValueError, match=f"^init_coef is -1; {kl}"):
        AdaptiveKLController(-1, 0.1, 10)
    with pytest.raises(ValueError, match=f"^coef is nan; {kl}"):
        FixedKLController(math.nan)
    with pytest.raises(ValueError, match=r"^target is 0; the KL to hold must be positive, e\.g\. 0\.1$"):
        AdaptiveKLController(0.1, 0, 10)
    with pytest.raises(ValueError, match=r"^horizon is 0; it must be a positive number of samples, e\.g\. 10000$"):
        AdaptiveKLController(0.1, 0.1, 0)
    controller = AdaptiveKLController(0.1, 0.1, 10)
    with pytest.raises(ValueError, match=r"^observed_kl is NaN; the KL coefficient would stay NaN for the rest of the"):
        controller.update(math.nan, 1)
    with pytest.raises(ValueError, match=r"^n is 50 with horizon 10; 0 <= n < 5 \* horizon = 50 keeps coef > 0$"):
        controller.update(0.1, 50)
    assert controller.coef == 0.1
