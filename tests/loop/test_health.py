"""Advice is given when a symptom has lasted, once, and again only after a recovery."""

from __future__ import annotations

import logging

import pytest

from rllava_pl.loop.health import SYMPTOMS, HealthCheck

HEALTHY = {
    "train/informative_groups": 0.5,
    "train/reward": 0.4,
    "train/truncated_fraction": 0.1,
    "train/entropy": 0.7,
    "train/effective_sample_size": 0.98,
    "train/clip_fraction": 0.01,
    "train/grad_norm": 0.3,
}
SICK = {
    "equal rewards": ("train/informative_groups", 0.0, "every advantage is 0"),
    "one reward": ("train/reward_std", 0.0, "all answers to all prompts earned the same reward (0.4)"),
    "everything truncated": ("train/truncated_fraction", 0.97, "97% of the responses were cut off by the budget"),
    "entropy gone": ("train/entropy", 1e-4, "the policy has become deterministic (entropy 0.0001 nats)"),
    "policy far from its samples": ("train/effective_sample_size", 0.25, "(effective sample size 25%)"),
    "almost everything clipped": ("train/clip_fraction", 0.6, "cuts off the gradient of 60% of the tokens"),
    "gradient gone": ("train/grad_norm", 0.0, "the gradient is exactly 0"),
}


def test_every_symptom_has_a_case() -> None:
    assert set(SICK) == {symptom.name for symptom in SYMPTOMS}


@pytest.mark.parametrize("name", SICK)
def test_advice_comes_once_after_patience_and_again_only_after_recovery(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    metric, value, advice = SICK[name]
    healthy = {key: x for key, x in HEALTHY.items() if name != "one reward" or key != "train/informative_groups"}
    health, sick = HealthCheck(patience=3), healthy | {metric: value}
    given = [len(health.check(metrics)) for metrics in (sick, sick, healthy, sick, sick)]
    assert given == [0, 0, 0, 0, 0]  # never three in a row
    with caplog.at_level(logging.WARNING):
        (due,) = health.check(sick)
    assert caplog.messages == [due] and due.startswith(f"{name}, 3 rollouts in a row: ")
    assert advice in due
    assert [health.check(sick) for _ in range(20)] == [[]] * 20
    assert health.check(healthy) == []
    assert [len(health.check(sick)) for _ in range(4)] == [0, 0, 1, 0]


def test_symptoms_are_counted_separately() -> None:
    health = HealthCheck(patience=2)
    sick = HEALTHY | {"train/entropy": 0.0}
    health.check(sick)
    both = health.check(sick | {"train/grad_norm": 0.0})
    assert [advice.split(",")[0] for advice in both] == ["entropy gone"]
    assert [advice.split(",")[0] for advice in health.check(sick | {"train/grad_norm": 0.0})] == ["gradient gone"]


def test_equal_rewards_within_groups_are_no_symptom_where_advantages_differ() -> None:
    """REINFORCE++ learns from differences between prompts, also where all answers to each prompt score the same."""
    sick = HEALTHY | {"train/informative_groups": 0.0, "train/advantage_std": 1.0, "train/reward_std": 0.4}
    assert HealthCheck(patience=1).check(sick) == []


def test_missing_metric_is_no_symptom() -> None:
    health = HealthCheck(patience=1)
    assert health.check({}) == []
    for name in HEALTHY:
        assert health.check({k: v for k, v in HEALTHY.items() if k != name}) == []
