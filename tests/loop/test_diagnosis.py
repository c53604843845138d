"""Advice is given when a symptom has lasted, once, and again only after a recovery."""

from __future__ import annotations

import logging

import pytest

from rllava_pl.loop.diagnosis import SYMPTOMS, Diagnosis

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


def test_every_symptom_is_here() -> None:
    assert set(SICK) == {symptom.name for symptom in SYMPTOMS}


@pytest.mark.parametrize("name", SICK)
def test_one_word_after_patience_and_another_only_after_recovery(name: str, caplog: pytest.LogCaptureFixture) -> None:
    metric, value, advice = SICK[name]
    healthy = {key: x for key, x in HEALTHY.items() if name != "one reward" or key != "train/informative_groups"}
    diagnosis, sick = Diagnosis(patience=3), healthy | {metric: value}
    told = [len(diagnosis.look(metrics)) for metrics in (sick, sick, healthy, sick, sick)]
    assert told == [0, 0, 0, 0, 0]  # never three in a row
    with caplog.at_level(logging.WARNING):
        (due,) = diagnosis.look(sick)
    assert caplog.messages == [due] and due.startswith(f"{name}, 3 rollouts in a row: ")
    assert advice in due
    assert [diagnosis.look(sick) for _ in range(20)] == [[]] * 20
    assert diagnosis.look(healthy) == []
    assert [len(diagnosis.look(sick)) for _ in range(4)] == [0, 0, 1, 0]


def test_symptoms_are_counted_apart() -> None:
    diagnosis = Diagnosis(patience=2)
    sick = HEALTHY | {"train/entropy": 0.0}
    diagnosis.look(sick)
    both = diagnosis.look(sick | {"train/grad_norm": 0.0})
    assert [advice.split(",")[0] for advice in both] == ["entropy gone"]
    assert [advice.split(",")[0] for advice in diagnosis.look(sick | {"train/grad_norm": 0.0})] == ["gradient gone"]


def test_credit_that_does_not_come_from_groups_is_none_of_their_business() -> None:
    """REINFORCE++ learns from differences between prompts, where every group is of one mind."""
    sick = HEALTHY | {"train/informative_groups": 0.0, "train/advantage_std": 1.0, "train/reward_std": 0.4}
    assert Diagnosis(patience=1).look(sick) == []


def test_metrics_that_an_algorithm_does_not_have_show_nothing() -> None:
    diagnosis = Diagnosis(patience=1)
    assert diagnosis.look({}) == []
    for name in HEALTHY:
        assert diagnosis.look({k: v for k, v in HEALTHY.items() if k != name}) == []
