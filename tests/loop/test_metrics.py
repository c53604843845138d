"""Metrics are exact whatever was added in which portions."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.loop.metrics import MetricAccumulator, moments

GENERATOR = torch.Generator().manual_seed(0)
X_NT = 3 + 2 * torch.randn(12, 7, generator=GENERATOR, dtype=torch.float64)
MASK_NT = torch.rand(12, 7, generator=GENERATOR) < 0.6


@pytest.mark.parametrize("rows", [12, 5, 1])
def test_mean_std_and_effective_size_do_not_depend_on_portions(rows: int) -> None:
    metrics, weights_NT = MetricAccumulator(), X_NT.abs()
    for x, w, mask in zip(X_NT.split(rows), weights_NT.split(rows), MASK_NT.split(rows), strict=True):
        metrics.add_masked({"mean": x} | moments("x_std", x) | moments("ess", w), mask)
    means = metrics.means()
    x, w = X_NT[MASK_NT], weights_NT[MASK_NT]
    assert means["mean"] == pytest.approx(float(x.mean()), rel=1e-12)
    assert means["x_std"] == pytest.approx(float(x.std(correction=0)), rel=1e-10)
    assert means["ess"] == pytest.approx(float(w.sum() ** 2 / (len(w) * w.square().sum())), rel=1e-10)
    assert set(means) == {"mean", "x_std", "ess"}


def test_effective_size_is_one_for_equal_weights_and_one_nth_for_one_that_outweighs_the_rest() -> None:
    """n weights, one of them infinitely larger: (w/n)² / (w²/n) = 1/n."""
    metrics, mask = MetricAccumulator(), torch.ones(4, dtype=torch.bool)
    metrics.add_masked(moments("equal", torch.full((4,), 2.5)), mask)
    metrics.add_masked(moments("alone", torch.tensor([1e12, 1.0, 1.0, 1.0])), mask)
    assert metrics.means() == pytest.approx({"equal": 1.0, "alone": 0.25})


def test_nothing_added_gives_zero_and_not_nan() -> None:
    metrics, nothing = MetricAccumulator(), torch.zeros(3, dtype=torch.bool)
    assert metrics.means() == {}
    metrics.add_masked({"mean": torch.full((3,), torch.nan)}, nothing)
    metrics.add_masked(moments("x_std", torch.ones(3)) | moments("ess", torch.ones(3)), nothing)
    assert metrics.means() == {"mean": 0.0, "x_std": 0.0, "ess": 0.0}


def test_std_of_a_constant_is_zero_in_spite_of_rounding() -> None:
    metrics = MetricAccumulator()
    metrics.add_masked(moments("x_std", torch.full((1000,), 0.98)), torch.ones(1000, dtype=torch.bool))
    assert metrics.means()["x_std"] < 1e-6


def test_totals_are_added_up_and_means_are_not() -> None:
    metrics = MetricAccumulator()
    for skipped in (2.0, 3.0):
        metrics.add_total("skipped", torch.tensor(skipped))
        metrics.add("norm", torch.tensor(skipped))
    assert metrics.means() == {"skipped": 5.0, "norm": 2.5}


def test_maximum_is_over_everything_that_the_mask_shows() -> None:
    metrics = MetricAccumulator()
    metrics.add("norm", torch.tensor(1.0))
    for x in ([0.5, 9.0], [0.7, 0.1]):
        metrics.add_max("gap", torch.tensor(x), torch.tensor([True, False]))
    assert metrics.means()["gap"] == pytest.approx(0.7)


def test_several_sums_over_the_same_things_have_one_count() -> None:
    metrics = MetricAccumulator()
    metrics.add_all(["loss", "kl_loss"], torch.tensor([3.0, 1.0]), 2.0)
    metrics.add("loss", torch.tensor(1.0))
    assert metrics.means() == pytest.approx({"loss": 4 / 3, "kl_loss": 0.5})


def test_after_clear_nothing_is_left() -> None:
    metrics = MetricAccumulator()
    metrics.add_masked(moments("x_std", torch.ones(2)), torch.ones(2, dtype=torch.bool))
    metrics.clear()
    metrics.add("x_std", torch.tensor(3.0))
    assert metrics.means() == {"x_std": 3.0}


def test_rollback_forgets_what_was_added_since_the_snapshot() -> None:
    metrics = MetricAccumulator()
    metrics.add("loss", torch.tensor(1.0))
    snapshot = metrics.snapshot()
    metrics.add("loss", torch.tensor(9.0))
    metrics.add_max("gap", torch.ones(1), torch.ones(1, dtype=torch.bool))
    metrics.rollback(snapshot)
    assert metrics.means() == {"loss": 1.0}


def test_state_continues_a_mean() -> None:
    metrics, resumed = MetricAccumulator(), MetricAccumulator()
    metrics.add("loss", torch.tensor(1.0))
    resumed.restore(metrics.state())
    resumed.add("loss", torch.tensor(2.0))
    assert resumed.means() == {"loss": 1.5}


def test_metrics_hold_no_graph() -> None:
    metrics, x = MetricAccumulator(), torch.ones(3, requires_grad=True)
    metrics.add_masked({"x": x * 2}, torch.ones(3, dtype=torch.bool))
    metrics.add("y", x.sum())
    metrics.add_max("z", x, torch.ones(3, dtype=torch.bool))
    assert not any(entry.totals.requires_grad for entry in metrics.entries)
    assert not any(x.requires_grad for _, x in metrics.maxima)
