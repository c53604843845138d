"""Losses whose ratio belongs to a whole response: GSPO and GMPO."""

from __future__ import annotations

import math

import pytest
import torch

from rllava_pl.functional.losses import gmpo, gspo
from tests.functional.cases import RATIO_RTOL, assert_near, cases, generator, matrix, rows, slow_ratio

DTYPES = [torch.float32, torch.float64]
EVERY_TOKEN = torch.ones(1, 3, dtype=torch.bool)


def slow_mean(values: list[float], kept: list[bool]) -> float:
    chosen = [value for value, keep in zip(values, kept, strict=True) if keep]
    return sum(chosen) / len(chosen) if chosen else 0.0


def slow_gspo(x: list[float], credit: list[float], kept: list[bool], low: float, high: float) -> list[float]:
    ratio = slow_ratio(slow_mean(x, kept))
    bounded = min(max(ratio, 1 - low), 1 + high)
    return [max(-a * ratio, -a * bounded) if keep else 0.0 for a, keep in zip(credit, kept, strict=True)]


def slow_gmpo(x: list[float], credit: list[float], kept: list[bool], low: float, high: float) -> list[float]:
    advantage = slow_mean(credit, kept)
    y = [min(term, high) if advantage > 0 else max(term, -low) for term in x]
    return [-advantage * slow_ratio(slow_mean(y, kept)) if keep else 0.0 for keep in kept]


@pytest.mark.parametrize(
    ("loss", "x", "advantage", "expected"),
    [
        # mean (0.1 - 0.2 - 0.3) / 3 = -0.133333, e^-0.133333 = 0.875173; below 1 - 3e-4, which stops A < 0 alone
        (gspo, [0.1, -0.2, -0.3], 1.0, -0.875173),
        (gspo, [0.1, -0.2, -0.3], -1.0, 0.9997),
        # A > 0 cuts 0.6 to 0.4: mean (0.4 + 0.1 - 0.5) / 3 = 0; A < 0 lifts -0.5 to -0.4: mean 0.3 / 3, e^0.1
        (gmpo, [0.6, 0.1, -0.5], 1.0, -1.0),
        (gmpo, [0.6, 0.1, -0.5], -1.0, 1.105171),
    ],
)
def test_known_rows_have_their_losses(loss, x, advantage, expected):
    for dtype in DTYPES:
        logp = torch.tensor([x], dtype=dtype)
        actual = loss(logp, torch.zeros_like(logp), torch.full_like(logp, advantage), EVERY_TOKEN)
        torch.testing.assert_close(actual, torch.full_like(logp, expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "slow", "low", "high"),
    [
        (gspo, slow_gspo, 3e-4, 4e-4),
        (gspo, slow_gspo, 1.0, math.inf),
        (gmpo, slow_gmpo, 0.4, 0.4),
        (gmpo, slow_gmpo, 0.1, math.inf),
    ],
)
def test_losses_equal_a_slow_loop(loss, slow, low, high, dtype):
    for logp, old, credit, mask in cases(dtype, seed=20):
        actual = loss(logp, old, credit, mask, clip_low=low, clip_high=high)
        expected = [
            slow([p - o for p, o in zip(*row[:2], strict=True)], *row[2:], low, high)
            for row in rows(logp, old, credit, mask)
        ]
        assert_near(actual, matrix(expected, logp), dtype=dtype, rtol=RATIO_RTOL[dtype])


def test_gspo_gradient_flows_through_the_own_token_only():
    logp = torch.tensor([[0.1, -0.2, -0.3]], dtype=torch.float64, requires_grad=True)
    loss = gspo(logp, torch.zeros_like(logp), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), EVERY_TOKEN)
    jacobian = torch.stack([torch.autograd.grad(token, logp, retain_graph=True)[0][0] for token in loss[0]])
    ratio = math.exp(-0.4 / 3)
    torch.testing.assert_close(jacobian, torch.diag(torch.tensor([-1.0, -2, -3], dtype=torch.float64)) * ratio)


def test_gspo_clips_a_response_as_a_whole():
    x = torch.tensor([[0.5, -0.1, 0.2], [0.5, -0.9, 0.2]], requires_grad=True)  # means 0.2 and -0.067
    loss = gspo(x, torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    gradient = torch.autograd.grad(loss.sum(), x)[0]
    assert (gradient[0] == 0).all()
    assert (gradient[1] < 0).all()


def test_gspo_has_one_value_per_row_for_log_probs_of_any_size():
    logp, old = -30 * torch.rand(2, 5, 100, generator=generator(21))
    old = logp + 1e-5 * old  # a mean ratio within the range, which is narrower than fp32 is exact at -30
    everything = torch.ones(5, 100, dtype=torch.bool)
    loss = gspo(logp, old, torch.ones(5, 100), everything)
    assert (loss == loss[:, :1]).all()
    torch.testing.assert_close(loss[:, 0].double(), -(logp.double() - old.double()).mean(1).exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("advantage", "gradient"),
    # (0.6, 0.1, -0.5): A > 0 holds the first at 0.4, e^0 / 3 a token; A < 0 holds the last at -0.4, e^0.1 / 3 a token
    [(1.0, [0.0, -1 / 3, -1 / 3]), (-1.0, [0.368390, 0.368390, 0.0])],
)
def test_gmpo_clips_the_side_that_lowers_the_loss(advantage, gradient):
    logp = torch.tensor([[0.6, 0.1, -0.5]], requires_grad=True)
    loss = gmpo(logp, torch.zeros(1, 3), torch.full((1, 3), advantage), EVERY_TOKEN)
    actual = torch.autograd.grad(loss.mean(), logp)[0]
    torch.testing.assert_close(actual, torch.tensor([gradient]), atol=1e-6, rtol=0)


def test_wrong_option_is_refused_by_name():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"^clip_low is 0\.0003, clip_high is -1; both must be .* distances from 1$"):
        gspo(x, x, x, EVERY_TOKEN, clip_high=-1)
    with pytest.raises(
        ValueError,
        match=r"^clip_low is nan, clip_high is 0\.4; both must be 0 or positive distances from a log-ratio of 0$",
    ):
        gmpo(x, x, x, EVERY_TOKEN, clip_low=math.nan)
