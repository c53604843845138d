"""Metrics are exact whatever was added in which portions."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.loop.tally import Tally

GENERATOR = torch.Generator().manual_seed(0)
X_NT = 3 + 2 * torch.randn(12, 7, generator=GENERATOR, dtype=torch.float64)
MASK_NT = torch.rand(12, 7, generator=GENERATOR) < 0.6


@pytest.mark.parametrize("rows", [12, 5, 1])
def test_mean_spread_and_effective_size_over_portions(rows: int) -> None:
    tally, weights_NT = Tally(), X_NT.abs()
    for x, w, mask in zip(X_NT.split(rows), weights_NT.split(rows), MASK_NT.split(rows), strict=True):
        tally.add_masked("mean", x, mask)
        tally.add_spread("std", x, mask)
        tally.add_effective_size("ess", w, mask)
    means = tally.means()
    x, w = X_NT[MASK_NT], weights_NT[MASK_NT]
    assert means["mean"] == pytest.approx(float(x.mean()), rel=1e-12)
    assert means["std"] == pytest.approx(float(x.std(correction=0)), rel=1e-10)
    assert means["ess"] == pytest.approx(float(w.sum() ** 2 / (len(w) * w.square().sum())), rel=1e-10)
    assert set(means) == {"mean", "std", "ess"}


def test_equal_weights_are_all_effective_and_one_that_outweighs_the_rest_is_alone() -> None:
    """n weights, one of them infinitely larger: (w/n)² / (w²/n) = 1/n."""
    tally, mask = Tally(), torch.ones(4, dtype=torch.bool)
    tally.add_effective_size("equal", torch.full((4,), 2.5), mask)
    tally.add_effective_size("alone", torch.tensor([1e12, 1.0, 1.0, 1.0]), mask)
    assert tally.means() == pytest.approx({"equal": 1.0, "alone": 0.25})


def test_nothing_added_is_zero_and_not_nan() -> None:
    tally, nothing = Tally(), torch.zeros(3, dtype=torch.bool)
    assert tally.means() == {}
    tally.add_masked("mean", torch.full((3,), torch.nan), nothing)
    tally.add_spread("std", torch.ones(3), nothing)
    tally.add_effective_size("ess", torch.ones(3), nothing)
    assert tally.means() == {"mean": 0.0, "std": 0.0, "ess": 0.0}


def test_a_constant_has_no_spread_in_spite_of_rounding() -> None:
    tally = Tally()
    tally.add_spread("std", torch.full((1000,), 0.98), torch.ones(1000, dtype=torch.bool))
    assert tally.means()["std"] < 1e-6


def test_totals_are_added_up_and_means_are_not() -> None:
    tally = Tally()
    for skipped in (2.0, 3.0):
        tally.add_total("skipped", torch.tensor(skipped))
        tally.add("norm", torch.tensor(skipped))
    assert tally.means() == {"skipped": 5.0, "norm": 2.5}


def test_after_clear_it_begins_from_nothing() -> None:
    tally = Tally()
    tally.add_spread("x", torch.ones(2), torch.ones(2, dtype=torch.bool))
    tally.clear()
    tally.add("x", torch.tensor(3.0))
    assert tally.means() == {"x": 3.0}


def test_metrics_hold_no_graph() -> None:
    tally, x = Tally(), torch.ones(3, requires_grad=True)
    tally.add_masked("x", x * 2, torch.ones(3, dtype=torch.bool))
    tally.add("y", x.sum())
    assert not any(part.requires_grad for parts in tally._sums.values() for part in parts)
