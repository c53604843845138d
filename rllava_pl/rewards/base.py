"""The base class of rewards, and the sum of several of them.

A sample that could not be scored never becomes a silent 0: its reward is ``None`` and its cause is counted, so that
the caller can drop its group. Faults of a single score (not a number, wrong type) are counted that way; faults of the
reward itself (an exception, a wrong number of scores) stop the run, because no score of it can be trusted.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real

from rllava_pl.types import Reward, Rollout, Score

FLOAT32_MAX = 3.4028234663852886e38
"""Rewards end up in float32 tensors; a larger number would arrive there as infinity."""

_NO_REWARD = """\
no reward given: without one there is nothing to learn from. Give at least one, for example in YAML
rewards:
  - class_path: rllava_pl.rewards.AnswerTagReward
    init_args: {weight: 1.0}"""


class RewardError(RuntimeError):
    """A reward broke its contract in a way that says nothing about single samples."""


class BaseReward(ABC):
    """Scores rollouts one by one; subclass it and write ``score``.

    The score is a pure function of the rollout: no printing, no network, no randomness. An exception stops the run with
    the reward and the prompt named; what a reward cannot judge it returns as ``Score(None, reason="...")``.

    Example::

        class Brevity(BaseReward):
            def score(self, rollout: Rollout) -> Score:
                return Score(1.0 / (1 + len(rollout.response_ids)))

    Args:
        weight: Factor of this reward in the sum of rewards.

    Raises:
        ValueError: If the weight is not a finite number.
    """

    weight: float = 1.0
    name: str = "base"
    """For metric names; derived from the class (``AnswerTagReward`` -> ``answer_tag``) unless a subclass sets it."""
    components: tuple[str, ...] = ()
    """Components that every score carries. A reward that declares none is logged by its value, under its name."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Derive ``name`` and check ``components`` when the class is written, not when it first scores."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _snake(cls.__name__)
        if isinstance(cls.components, str):
            raise TypeError(f'{cls.__name__}.components is a string; write components = ("{cls.components}",)')

    def __init__(self, weight: float = 1.0) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"{type(self).__name__}: weight is {weight}; it must be a finite number")
        self.weight = weight

    @abstractmethod
    def score(self, rollout: Rollout) -> Score:
        """Judge one rollout."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout, in order; an exception is raised on with a note that names the prompt."""
        scores = []
        for rollout in rollouts:
            try:
                scores.append(self.score(rollout))
            except Exception as error:
                place = f" ({rollout.prompt.source})" if rollout.prompt.source else ""
                error.add_note(f"{type(self).__name__} was scoring a response to prompt {rollout.prompt.uid!r}{place}")
                raise
        return scores


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


def judge(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> Judgement:
    """Score all rollouts with all rewards: ``r_i = sum_k weight_k * value_ik``.

    A component that two rewards declare is prefixed by the name of its reward (``answer_tag/accuracy``), and so is one
    that its reward does not declare, unless there is only one reward. Whether a name has a prefix thus depends on the
    rewards and never on the data; declared components are there in every batch and on every rank.

    Args:
        rewards: At least one; each is called once, with all rollouts.
        rollouts: N samples.

    Returns:
        Rewards, components and causes, in the order of ``rollouts``. A score that is missing (``missing``), no
        ``Score`` or not of numbers (``bad_type``), not finite in float32 (``not_finite``), or without a declared
        component (``missing_component``) counts as unscored.

    Raises:
        ValueError: If there is no reward.
        TypeError: If one of them is no reward.
        RewardError: If a weight is not finite, or a reward does not return a list of one score a rollout.
    """
    if not rewards:
        raise ValueError(_NO_REWARD)
    for position, reward in enumerate(rewards):
        _check_reward(reward, position)
    scores = [_call(reward, rollouts) for reward in rewards]
    totals: list[float | None] = []
    causes: Counter[str] = Counter()
    for row in zip(*scores, strict=True):
        total = _weighted_sum(rewards, row)
        totals.append(total.value)
        if total.value is None:
            causes[total.reason] += 1
    return Judgement(totals, _columns(rewards, scores), causes)


def _check_reward(reward: object, position: int) -> None:
    if not isinstance(reward, Reward):
        raise TypeError(
            f"rewards[{position}] is {reward!r}, which is no reward: it needs a `weight` and "
            "`__call__(rollouts) -> list[Score]`; subclass rllava_pl.rewards.BaseReward"
        )
    if not isinstance(reward.weight, Real) or _number(reward.weight) is None:
        raise RewardError(f"rewards[{position}], {type(reward).__name__}: weight {reward.weight!r} is no finite number")


def _call(reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
    """The scores of one reward, each checked."""
    try:
        scores: object = reward(rollouts)
    except Exception as error:
        uids = _some(list(dict.fromkeys(rollout.prompt.uid for rollout in rollouts)))
        error.add_note(f"raised by reward {type(reward).__name__}, given {len(rollouts)} rollouts of prompts {uids}")
        raise
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(f"{type(reward).__name__} returned {type(scores).__name__}; it must return a list of Score")
    if len(scores) != len(rollouts):
        raise RewardError(
            f"{type(reward).__name__} returned {len(scores)} scores for {len(rollouts)} rollouts; it must be one each"
        )
    declared = _declared(reward)
    return [_checked(score, declared) for score in scores]


def _checked(score: object, declared: tuple[str, ...]) -> Score:
    """The score with plain floats, or an unscored one that says what was wrong."""
    if score is None:
        return Score(None, reason="missing")
    if not isinstance(score, Score) or not isinstance(score.components, Mapping):
        return Score(None, reason="bad_type")
    if score.value is None:
        return Score(None, reason=str(score.reason) or "no_reason")
    if not all(type(x) is float or isinstance(x, Real) for x in (score.value, *score.components.values())):
        return Score(None, reason="bad_type")
    if any(component not in score.components for component in declared):
        return Score(None, reason="missing_component")
    value = _number(score.value)
    components = {str(name): number for name, x in score.components.items() if (number := _number(x)) is not None}
    if value is None or len(components) < len(score.components):
        return Score(None, reason="not_finite")
    return Score(value, components)


def _weighted_sum(rewards: Sequence[Reward], row: Sequence[Score]) -> Score:
    """One sample's reward, or the first cause why there is none."""
    total = 0.0
    for reward, score in zip(rewards, row, strict=True):
        if score.value is None:
            return score
        total += reward.weight * score.value
    return Score(None, reason="not_finite") if _number(total) is None else Score(total)


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
    return str(getattr(reward, "name", "") or _snake(type(reward).__name__))


def _unique(names: Sequence[str]) -> list[str]:
    """Number the repeated names: two rewards called ``iou`` become ``iou`` and ``iou_2``."""
    taken: dict[str, None] = {}
    for name in names:
        candidates: Iterator[str] = (name if k == 1 else f"{name}_{k}" for k in range(1, len(names) + 1))
        taken[next(candidate for candidate in candidates if candidate not in taken)] = None
    return list(taken)


def _number(x: float) -> float | None:
    """``x`` as a float if it is finite in float32; integers too large for any float are not."""
    try:
        number = float(x)
    except OverflowError:
        return None
    return number if abs(number) <= FLOAT32_MAX else None


def _snake(class_name: str) -> str:
    """``AnswerTagReward`` -> ``answer_tag``."""
    stem = class_name.removesuffix("Reward") or class_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", stem).lower()


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
