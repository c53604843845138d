"""The weighted sum of several rewards.

A sample that could not be scored never becomes a silent 0: its reward is ``None`` and its cause is counted, so that
the caller can drop its group.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, repeat
from numbers import Real
from typing import TypeGuard

from rllava_pl.redaction import escaped
from rllava_pl.rewards.base import RewardError, snake_case
from rllava_pl.rewards.scoring import finite_float, score_rollouts
from rllava_pl.types import Reward, Rollout, Score

log = logging.getLogger(__name__)

_NO_REWARD = """\
no reward given: without one there is nothing to learn from. Give at least one, for example in YAML
rewards:
  - class_path: rllava_pl.rewards.AnswerTagReward
    init_args: {weight: 1.0}"""


@dataclass(frozen=True)
class RewardOutput:
    """The sum of all rewards for N rollouts, with its parts and the causes where there is none.

    Example: ``compute_rewards([AnswerTagReward()], rollouts)`` of a right answer, a well-formed wrong one, and one to a
    prompt without a label gives ``rewards = [1.0, 0.1, None]``, ``causes = {"no_answer": 1}`` and
    ``components = {"accuracy": [1.0, 0.0, nan], "format": [1.0, 1.0, nan]}``.
    """

    rewards: list[float | None]
    """N: sum of weight x value over the rewards that apply to the row; None: unscored, because one of these failed or
    none applies."""
    components: dict[str, list[float]]
    """N each: named parts, before the weights; nan where their reward does not apply, failed, or did not name them."""
    causes: Mapping[str, int]
    """Number of unscored samples by cause; a sample counts once, for the first reward that could not score it."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """Number of scores by flag."""
    applies: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    """N each: whether the reward of a component applies to the row; components left out apply to all rows."""

    @property
    def unscored(self) -> int:
        """Number of samples without a reward."""
        return sum(self.causes.values())

    def zeroed(self) -> RewardOutput:
        """A copy with 0 for unscored samples and for what failed in them; the causes stay."""
        components = {}
        for name, column in self.components.items():
            rows = zip(self.rewards, self.applies.get(name, repeat(True)), column, strict=False)
            components[name] = [0.0 if r is None and applies and math.isnan(x) else x for r, applies, x in rows]
        return replace(self, rewards=[reward or 0.0 for reward in self.rewards], components=components)


def compute_rewards(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> RewardOutput:
    """Score all rollouts with all rewards in this process: ``r_i = sum_k weight_k * value_ik``.

    The sum runs over the rewards that apply to row ``i``. A component that two rewards declare is prefixed by the name
    of its reward (``answer_tag_accuracy``), and so is one that its reward does not declare, unless there is only one
    reward. Names of declared components depend on the rewards and never on the data: they are the same in every batch
    and on every rank. The first fault of each cause is logged with reward and prompt; ``rllava_pl.rewards.scoring``
    lists the causes.

    Raises:
        ValueError: If there is no reward.
        TypeError: If one of them is not a reward.
        RewardError: If a weight is not finite.
    """
    check_rewards(rewards)
    return combine_scores(rewards, rollouts, [score_rollouts(reward, rollouts) for reward in rewards])


def check_rewards(rewards: Sequence[object]) -> None:
    """Raise what ``compute_rewards`` documents."""
    if not rewards:
        raise ValueError(_NO_REWARD)
    for position, reward in enumerate(rewards):
        if not isinstance(reward, Reward):
            raise TypeError(
                f"rewards[{position}] is {reward!r}, which is no reward: it needs a `weight` and "
                "`__call__(rollouts) -> list[Score]`; subclass rllava_pl.rewards.BaseReward"
            )
        if not isinstance(reward.weight, Real) or finite_float(reward.weight) is None:
            raise RewardError(
                f"rewards[{position}], {type(reward).__name__}: weight {reward.weight!r} is not a finite number"
            )


def combine_scores(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], scores: Sequence[Sequence[Score]]
) -> RewardOutput:
    """Add up the checked scores of every reward; the rest is as in ``compute_rewards``."""
    weights = [reward.weight for reward in rewards]
    totals = [_weighted_sum(weights, row) for row in zip(*scores, strict=True)]
    for name, column in zip([*map(reward_name, rewards), "sum"], [*scores, totals], strict=True):
        faults = [(rollout.prompt, x) for rollout, x in zip(rollouts, column, strict=True) if _is_fault(x)]
        for prompt, score in {score.reason: (prompt, score) for prompt, score in reversed(faults)}.values():
            where = f"{prompt.uid!r} ({prompt.source})" if prompt.source else repr(prompt.uid)
            log.warning("reward %s, %s at prompt %s: %s", *map(escaped, (name, score.reason, where, score.detail)))
    causes = Counter(total.reason for total in totals if isinstance(total, Score))
    flags = Counter(flag for score in chain.from_iterable(scores) for flag in score.flags)
    components, applies = _columns(rewards, scores)
    values = [None if isinstance(total, Score) else total for total in totals]
    return RewardOutput(values, components, causes, flags, applies)


def _is_fault(x: Score | float) -> TypeGuard[Score]:
    """Whether a score is missing by a fault; what a reward returns on purpose has no detail."""
    return isinstance(x, Score) and x.value is None and bool(x.detail)


def _weighted_sum(weights: Sequence[float], row: Sequence[Score]) -> float | Score:
    """One sample's reward, or an unscored one with the first cause why there is none."""
    total, applies = 0.0, False
    for weight, score in zip(weights, row, strict=True):
        if score.value is not None:
            total, applies = total + weight * score.value, True
        elif score.applicable:
            return Score(None, reason=score.reason)  # its detail is in the log already
    if not applies:
        return Score(None, reason="not_applicable", detail="no reward applies to this row")
    if finite_float(total) is None:
        return Score(None, reason="not_finite", detail="the weighted sum is infinite in float32")
    return total


def _columns(
    rewards: Sequence[Reward], scores: Sequence[Sequence[Score]]
) -> tuple[dict[str, list[float]], dict[str, list[bool]]]:
    """N numbers for each component, and whether its reward applies.

    A reward that declares no components has its value as one, under its name.
    """
    names = _numbered(map(reward_name, rewards))
    declared = [tuple(getattr(reward, "components", ())) for reward in rewards]
    own = [parts or (name,) for parts, name in zip(declared, names, strict=True)]
    rows = [
        [({} if parts or s.value is None else {name: s.value}) | dict(s.components) for s in column]
        for parts, name, column in zip(declared, names, scores, strict=True)
    ]
    found = [(k, component) for k, parts in enumerate(own) for component in parts]
    found += [(k, component) for k, column in enumerate(rows) for row in column for component in row]
    columns = list(dict.fromkeys(found))  # the declared ones first, so that their names do not depend on the data
    owners = Counter(chain.from_iterable(own))
    shown = [c if len(rewards) == 1 or (c in own[k] and owners[c] == 1) else f"{names[k]}_{c}" for k, c in columns]
    components, applies = {}, {}
    for name, (k, component) in zip(_numbered(x.replace("/", "_") for x in shown), columns, strict=True):
        components[name] = [row.get(component, math.nan) for row in rows[k]]
        applies[name] = [score.applicable for score in scores[k]]
    return components, applies


def reward_name(reward: Reward) -> str:
    """For the log and metrics: ``answer_tag`` for an ``AnswerTagReward``."""
    return str(getattr(reward, "name", "") or snake_case(type(reward).__name__))


def _numbered(names: Iterable[str]) -> list[str]:
    """Number the repeated names: two rewards called ``iou`` become ``iou`` and ``iou_2``."""
    numbered: list[str] = []
    for name in names:
        candidates = chain([name], (f"{name}_{k}" for k in count(2)))
        numbered.append(next(candidate for candidate in candidates if candidate not in numbered))
    return numbered
