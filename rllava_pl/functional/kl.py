"""KL divergence between policy and reference, estimated from sampled tokens, and its coefficient.

``d = logp - ref_logp`` of tokens drawn from the policy. After J. Schulman's note "Approximating KL divergence".
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rllava_pl.functional._numerics import check_choice, raised

KLEstimator = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]

_K3_LINEAR_FROM = 80.0
"""k3 grows linearly beyond: exp overflows fp32 at 88.7."""


def kl_estimate(logp_NT: Tensor, ref_logp_NT: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(policy || reference) at every token; elementwise.

    =================== ===================== ============= =====================================================
    estimator           value                 d/d logp      on-policy expectation of the gradient
    =================== ===================== ============= =====================================================
    k1                  d                     1             0: right inside the reward, useless as a loss
    abs                 abs(d)                sign(d)       none of a KL
    k2                  d^2 / 2               d             that of KL(policy || reference), exactly
    k3                  exp(-d) + d - 1       1 - exp(-d)   that of KL(reference || policy), the other direction
    k1+, abs+, k3+      of the first          d             that of KL(policy || reference)
    =================== ===================== ============= =====================================================

    k3 continues linearly for -d > 80, with a gradient that stays finite and does not vanish.

    ``ref_logp_NT`` are the log-probs of the same tokens under the reference. The result has the shape of the inputs, in
    at least fp32. An unknown ``estimator`` raises ValueError.

    >>> kl_estimate(torch.tensor([-5.0, -1.0]), torch.tensor([0.0, -1.0]), "k3")
    tensor([142.4132,   0.0000])
    """
    check_choice("estimator", estimator, get_args(KLEstimator))
    d = raised(logp_NT) - raised(ref_logp_NT)
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    name = estimator.removesuffix("+")
    value = d if name == "k1" else d.abs() if name == "abs" else _k3(d)
    # The bracket is exactly 0: adding it last keeps the value free of rounding.
    return value if name == estimator else value.detach() + (k2 - k2.detach())


def _k3(d: Tensor) -> Tensor:
    # Both branches see a clamped argument: the one not taken must not overflow, or its backward is 0 * inf.
    exact = torch.expm1((-d).clamp(max=_K3_LINEAR_FROM)) + d
    linear = math.exp(_K3_LINEAR_FROM) * ((-d).clamp(min=_K3_LINEAR_FROM) - (_K3_LINEAR_FROM - 1)) - 1 + d
    return torch.where(-d <= _K3_LINEAR_FROM, exact, linear)


class AdaptiveKLController:
    """A KL coefficient that keeps the observed KL near a target (arXiv 1909.08593, section 2.2).

    ``coef <- coef * (1 + clip(observed / target - 1, -0.2, 0.2) * n / horizon)``. ``coef`` is its whole state.

    Args:
        init_coef: Coefficient at the start, 0 or positive.
        target: KL per token to hold, in nats, positive; 0.1 is usual.
        horizon: Samples over which the coefficient may change by a fifth, positive; 10,000 is usual.

    >>> controller = AdaptiveKLController(0.001, target=0.1, horizon=10_000)
    >>> controller.update(0.3, 512)
    >>> round(controller.coef, 8)
    0.00101024
    """

    def __init__(self, init_coef: float, target: float, horizon: float) -> None:
        if not init_coef >= 0:
            raise ValueError(f"init_coef is {init_coef}; a KL coefficient must be 0 or positive")
        if not target > 0:
            raise ValueError(f"target is {target}; the KL to hold must be positive, e.g. 0.1")
        if not horizon > 0:
            raise ValueError(f"horizon is {horizon}; it must be a positive number of samples, e.g. 10000")
        self.coef, self.target, self.horizon = init_coef, target, horizon

    def update(self, observed_kl: float, n: int) -> None:
        """Move the coefficient after a rollout batch.

        Args:
            observed_kl: Token mean of k1 over the rollout batch of all ranks; NaN raises ValueError.
            n: Samples in that batch, below 5 * horizon: the coefficient could reach 0 otherwise.
        """
        if math.isnan(observed_kl):
            raise ValueError("observed_kl is NaN; the KL coefficient would stay NaN for the rest of the run")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(
                f"n is {n} with horizon {self.horizon}; 0 <= n < 5 * horizon = {5 * self.horizon} keeps coef > 0"
            )
        error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon


class FixedKLController:
    """A constant KL coefficient behind the interface of :class:`AdaptiveKLController`.

    Args:
        coef: The coefficient, 0 or positive.

    >>> controller = FixedKLController(0.04)
    >>> controller.update(0.3, 512)
    >>> controller.coef
    0.04
    """

    def __init__(self, coef: float) -> None:
        if not coef >= 0:
            raise ValueError(f"coef is {coef}; a KL coefficient must be 0 or positive")
        self.coef = coef

    def update(self, observed_kl: float, n: int) -> None:
        """Change nothing."""
