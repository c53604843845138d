"""Warnings when the metrics of several rollouts show that nothing is learnt, with what to change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]
EQUAL = 1e-6
"""Standard deviation up to which numbers count as equal."""


@dataclass(frozen=True)
class Symptom:
    """A state in which learning cannot happen, or is about to stop."""

    name: str
    present: Callable[[Metrics], bool]
    """Whether the metrics of one rollout show it; a metric that an algorithm does not have shows nothing."""
    advice: str
    """What it means and what to change; a format string over the metrics by name."""


def _at_most(name: str, limit: float) -> Callable[[Metrics], bool]:
    return lambda metrics: metrics.get(name, float("inf")) <= limit


def _at_least(name: str, limit: float) -> Callable[[Metrics], bool]:
    return lambda metrics: metrics.get(name, float("-inf")) >= limit


def _no_group_informative(metrics: Metrics) -> bool:
    """Rewards are equal within groups, and nothing but them gives credit: a batch baseline or a critic may."""
    return metrics.get("train/informative_groups", 1.0) <= 0 and metrics.get("train/advantage_std", 0.0) <= EQUAL


def _no_reward_differs(metrics: Metrics) -> bool:
    """The same without groups."""
    return "train/informative_groups" not in metrics and metrics.get("train/reward_std", 1.0) <= EQUAL


SYMPTOMS = (
    Symptom(
        "equal rewards",
        _no_group_informative,
        "all answers to a prompt earned the same reward (mean {train/reward:.3g}), so that every advantage is 0. If "
        "the mean is low the prompts are too hard or the reward reads another format than the model writes: look at "
        "the rollouts, give part credit, or begin with easier prompts; if it is high they are solved",
    ),
    Symptom(
        "one reward",
        _no_reward_differs,
        "all answers to all prompts earned the same reward ({train/reward:.3g}), so that there is nothing to learn "
        "from: the reward reads another format than the model writes, the prompts are too hard, or they are solved",
    ),
    Symptom(
        "everything truncated",
        _at_least("train/truncated_fraction", 0.95),
        "{train/truncated_fraction:.0%} of the responses were cut off by the budget, so that no answer is ever "
        "complete: raise sampling.max_tokens, or check that the model can sample its end token",
    ),
    Symptom(
        "entropy gone",
        _at_most("train/entropy", 1e-3),
        "the policy has become deterministic (entropy {train/entropy:.2g} nats): all samples of a prompt are equal and "
        "nothing new is tried. Raise kl.loss_coef or entropy_coef, lower the learning rate, or widen clip.high",
    ),
    Symptom(
        "policy far from its samples",
        _at_most("train/effective_sample_size", 0.3),
        "the samples no longer stand for the policy that is trained on them (effective sample size "
        "{train/effective_sample_size:.0%}): fewer batching.num_minibatches and batching.update_epochs, or a lower "
        "learning rate",
    ),
    Symptom(
        "almost everything clipped",
        _at_least("train/clip_fraction", 0.5),
        "the loss cuts off the gradient of {train/clip_fraction:.0%} of the tokens: lower the learning rate, use fewer "
        "batching.num_minibatches and batching.update_epochs, or check that the clip range fits the algorithm",
    ),
    Symptom(
        "gradient gone",
        _at_most("train/grad_norm", 0.0),
        "the gradient is exactly 0: nothing is trained. Look at train/informative_groups and at what is frozen",
    ),
)


class HealthCheck:
    """Warns once when a symptom has lasted, and again only after it was gone in between.

    Args:
        patience: Rollouts in a row with the symptom before the warning.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self._lasted: Counter[str] = Counter()

    def check(self, metrics: Metrics) -> list[str]:
        """The advice that is due after this rollout; each is also logged as a warning."""
        due = []
        for symptom in SYMPTOMS:
            self._lasted[symptom.name] = self._lasted[symptom.name] + 1 if symptom.present(metrics) else 0
            if self._lasted[symptom.name] == self.patience:
                due.append(f"{symptom.name}, {self.patience} rollouts in a row: {symptom.advice.format_map(metrics)}")
        for advice in due:
            log.warning(advice)
        return due
