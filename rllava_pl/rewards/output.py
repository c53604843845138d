"""The sum of several rewards.

A sample that could not be scored never becomes a silent 0: its reward is ``None`` and its cause is counted, so that
the caller can drop its group.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real

from rllava_pl.redaction import escaped
from rllava_pl.rewards.base import RewardError, snake
from rllava_pl.rewards.scoring import number, scored
from rllava_pl.types import Reward, Rollout, Score

log = logging.getLogger(__name__)

_NO_REWARD = """\
no reward given: without one there is nothing to learn from. Give at least one, for example in YAML
rewards:
  - class_path: rllava_pl.rewards.AnswerTagReward
    init_args: {weight: 1.0}"""


@dataclass(frozen=True)
class Judgement:
    """What all rewards together say of N rollouts.

    Example: ``judge([AnswerTagReward()], rollouts)`` of a right answer, a well-formed wrong one, and one to a prompt
    without a label gives ``rewards = [1.0, 0.1, None]``, ``causes = {"no_answer": 1}`` and
    ``components = {"accuracy": [1.0, 0.0, nan], "format": [1.0, 1.0, nan]}``.
    """

    rewards: list[float | None]
    """N: sum of weight x value over the rewards; None: at least one of them could not score the sample."""
    components: dict[str, list[float]]
    """N each: named parts, before the weights; nan where their reward did not score the sample or did not name them."""
    causes: Mapping[str, int]
    """Number of unscored samples by cause; a sample counts once, for the first reward that could not score it."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """Number of scores by flag."""

    @property
    def unscored(self) -> int:
        """Number of samples without a reward."""
        return sum(self.causes.values())

    def zeroed(self) -> Judgement:
        """The same with 0 in place of what could not be scored; the causes stay."""
        rewards: list[float | None] = [reward or 0.0 for reward in self.rewards]
        components = {
            name: [0.0 if r is None and math.isnan(x) else x for r, x in zip(self.rewards, column, strict=True)]
            for name, column in self.components.items()
        }
        return dataclasses.replace(self, rewards=rewards, components=components)


def judge(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> Judgement:
    """Score all rollouts with all rewards: ``r_i = sum_k weight_k * value_ik``.

    A component that two rewards declare is prefixed by the name of its reward (``answer_tag/accuracy``), and so is one
    that its reward does not declare, unless there is only one reward. Whether a name has a prefix thus depends on the
    rewards and never on the data; declared components are there in every batch and on every rank.

    Args:
        rewards: At least one; each is called once, with all rollouts.
        rollouts: N samples.

    Returns:
        Rewards, components and causes, in the order of ``rollouts``; ``rllava_pl.rewards.scoring`` has the causes.
        The first fault of each cause is logged with reward and prompt.

    Raises:
        ValueError: If there is no reward.
        TypeError: If one of them is no reward.
        RewardError: If a weight is not finite.
    """
    if not rewards:
        raise ValueError(_NO_REWARD)
    for position, reward in enumerate(rewards):
        _check_reward(reward, position)
    scores = [scored(reward, rollouts) for reward in rewards]
    for reward, column in zip(rewards, scores, strict=True):
        _log_faults(reward, rollouts, column)
    totals = [_weighted_sum(rewards, row) for row in zip(*scores, strict=True)]
    causes = Counter(total.reason for total in totals if total.value is None)
    flags = Counter(flag for score in chain.from_iterable(scores) for flag in score.flags)
    return Judgement([total.value for total in totals], _columns(rewards, scores), causes, flags)


def _check_reward(reward: object, position: int) -> None:
    if not isinstance(reward, Reward):
        raise TypeError(
            f"rewards[{position}] is {reward!r}, which is no reward: it needs a `weight` and "
            "`__call__(rollouts) -> list[Score]`; subclass rllava_pl.rewards.BaseReward"
        )
    if not isinstance(reward.weight, Real) or number(reward.weight) is None:
        raise RewardError(f"rewards[{position}], {type(reward).__name__}: weight {reward.weight!r} is no finite number")


def _log_faults(reward: Reward, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
    """One line a cause, about its first sample; causes that rewards give on purpose have no detail and no line."""
    seen: set[str] = set()
    for rollout, score in zip(rollouts, scores, strict=True):
        if score.value is None and score.detail and score.reason not in seen:
            seen.add(score.reason)
            prompt = f"{rollout.prompt.uid!r}" + (f" ({rollout.prompt.source})" if rollout.prompt.source else "")
            texts = (_name(reward), score.reason, prompt, score.detail)
            log.warning("reward %s, %s at prompt %s: %s", *map(escaped, texts))


def _weighted_sum(rewards: Sequence[Reward], row: Sequence[Score]) -> Score:
    """One sample's reward, or the first cause why there is none."""
    total = 0.0
    for reward, score in zip(rewards, row, strict=True):
        if score.value is None:
            return score
        total += reward.weight * score.value
    return Score(None, reason="not_finite") if number(total) is None else Score(total)


def _columns(rewards: Sequence[Reward], scores: Sequence[Sequence[Score]]) -> dict[str, list[float]]:
    """One list of N numbers a component."""
    declarations = [_declared(reward) for reward in rewards]
    names = _unique([_name(reward) for reward in rewards])
    shown = [declared or (name,) for declared, name in zip(declarations, names, strict=True)]
    owners = Counter(chain.from_iterable(shown))
    columns: dict[str, list[float]] = {}
    for name, own, declared, column in zip(names, shown, declarations, scores, strict=True):
        parts = [_parts(score, None if declared else name) for score in column]
        for component in dict.fromkeys(chain(own, *parts)):
            plain = len(rewards) == 1 or (component in own and owners[component] == 1)
            columns[component if plain else f"{name}/{component}"] = [part.get(component, math.nan) for part in parts]
    return columns


def _parts(score: Score, value_name: str | None) -> dict[str, float]:
    """Named numbers of one score; its value is among them, as ``value_name``, if its reward declares no components."""
    if score.value is None:
        return {}
    return ({} if value_name is None else {value_name: score.value}) | dict(score.components)


def _declared(reward: Reward) -> tuple[str, ...]:
    return tuple(getattr(reward, "components", ()))


def _name(reward: Reward) -> str:
    return str(getattr(reward, "name", "") or snake(type(reward).__name__))


def _unique(names: Sequence[str]) -> list[str]:
    """Number the repeated names: two rewards called ``iou`` become ``iou`` and ``iou_2``."""
    taken: dict[str, None] = {}
    for name in names:
        candidates: Iterator[str] = (name if k == 1 else f"{name}_{k}" for k in range(1, len(names) + 1))
        taken[next(candidate for candidate in candidates if candidate not in taken)] = None
    return list(taken)
