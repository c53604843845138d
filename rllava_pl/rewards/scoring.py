"""Scoring with one reward: options, and the faults that make a sample unscored.

``score_rollouts`` works in the same way in the trainer and in a worker process.

===================== ==============================================================================================
cause                 what happened
===================== ==============================================================================================
``exception``         the reward raised
``memory``            it raised ``MemoryError``: in a worker process, it reached the limit
``bad_type``          it returned something else than a ``Score`` of numbers, or no list of them
``bad_length``        it returned another number of scores than there were rollouts
``missing``           it returned ``None`` in place of a score
``missing_component`` a declared component is not in the score
``not_finite``        a number is NaN, infinite, or infinite in float32
``not_applicable``    no reward applies to the row
``timeout``           it took longer than ``timeout_seconds`` and its process was killed
``crash``             its process ended: a segmentation fault, ``os._exit``, or a kill from outside
``pool``              no worker process could be started
===================== ==============================================================================================

Other causes are those that rewards return themselves, as ``Score(None, reason="no_box")``.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeGuard

from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.types import Reward, Rollout, Score

FLOAT32_MAX = 3.4028234663852886e38
"""Rewards end up in float32 tensors, where a larger number would be infinite."""

MAX_DETAIL = 2000
"""Characters of an error's text that are kept."""

SHOWN_FRAMES = 4
"""Frames of a traceback that are named, from its end."""


@dataclass(frozen=True)
class Scoring:
    """How rewards are run, and what happens to samples that they could not score.

    Args:
        isolation: Where rewards run. auto: in worker processes, except for those whose class says
            ``isolation = "none"``, being fast and safe, and, with a warning, those that cannot be built in another
            process; process: the same, but the latter are refused; none: all in the trainer, where an exception costs
            a sample and a hang the run.
        timeout_seconds: Longest time for one sample, unless its reward sets another.
        memory_gib: Memory a worker process may allocate on top of what it starts with.
        workers: Worker processes on each rank.
        recycle_after: Samples after which a worker process is replaced by a fresh one.
        on_error: What happens to a sample without a score: drop_group leaves out its group, zero counts it as 0, stop
            ends the run. It is counted in any case.
        max_unscored: The run ends when more than this fraction of the samples had no score in each of ``patience``
            rollouts in a row; 1: never.
        patience: Rollouts in a row.
    """

    isolation: Literal["auto", "process", "none"] = "auto"
    timeout_seconds: float = 10.0
    memory_gib: float = 2.0
    workers: int = 4
    recycle_after: int = 10_000
    on_error: Literal["drop_group", "zero", "stop"] = "drop_group"
    max_unscored: float = 0.02
    patience: int = 5

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "memory_gib", "workers", "recycle_after", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"scoring.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"scoring.max_unscored is {self.max_unscored}; it is a fraction of the samples, 0 to 1")


def check_unscored(fractions: Sequence[float], scoring: Scoring) -> None:
    """Raise ``RewardError`` if the fraction of unscored samples was above the limit in each of the last rollouts."""
    last = fractions[-scoring.patience :]
    if len(last) == scoring.patience and min(last) > scoring.max_unscored:
        shown = ", ".join(f"{fraction:.1%}" for fraction in last)
        raise RewardError(
            f"{shown} of the samples had no score in the last {len(last)} rollouts, more than scoring.max_unscored "
            f"({scoring.max_unscored:.1%}): a reward does not work on this data; the log names causes and prompts"
        )


def score_rollouts(reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
    """One checked score per rollout, in order; an exception other than ``RewardError`` becomes an unscored sample.

    A reward that scores samples one by one loses the faulty one, a reward with its own ``__call__`` the whole call.
    """
    declared = tuple(getattr(reward, "components", ()))
    if not is_samplewise(reward):
        return _score_together(reward, rollouts, declared)
    scores = []
    for rollout in rollouts:
        try:
            scores.append(check_score(reward.score(rollout), declared))
        except RewardError:
            raise
        except Exception as error:
            scores.append(error_score(error))
    return scores


def _score_together(reward: Reward, rollouts: Sequence[Rollout], declared: tuple[str, ...]) -> list[Score]:
    """All samples in one call, which a fault costs them all."""
    try:
        returned: object = reward(rollouts)
        if not isinstance(returned, Sequence) or isinstance(returned, str):
            fault = Score(None, reason="bad_type", detail=f"returned {type(returned).__name__}, not a list of Score")
        elif len(returned) != len(rollouts):
            detail = f"returned {len(returned)} scores for {len(rollouts)} rollouts"
            fault = Score(None, reason="bad_length", detail=detail)
        else:
            return [check_score(score, declared) for score in returned]
    except RewardError:
        raise
    except Exception as error:
        fault = error_score(error)
    return [fault] * len(rollouts)


def is_samplewise(reward: Reward) -> TypeGuard[BaseReward]:
    """Whether a sample's score does not depend on the other samples of the call."""
    return isinstance(reward, BaseReward) and type(reward).__call__ is BaseReward.__call__


def error_score(error: BaseException) -> Score:
    """An unscored sample with ``ZeroDivisionError: division by zero, at my_reward.py:10 score`` as its detail."""
    what = "".join(traceback.format_exception_only(error)).strip()[:MAX_DETAIL]
    frames = traceback.extract_tb(error.__traceback__)[1:][-SHOWN_FRAMES:]  # the first is the caller's
    where = ", in ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    reason = "memory" if isinstance(error, MemoryError) else "exception"
    return Score(None, reason=reason, detail=f"{what}, at {where}" if where else what)


def check_score(score: object, declared: tuple[str, ...]) -> Score:
    """The score with plain floats, or an unscored one that says what was wrong."""
    if score is None:
        return Score(None, reason="missing", detail="returned None; say Score.not_applicable() if it does not apply")
    if not isinstance(score, Score) or not isinstance(score.components, Mapping):
        return Score(None, reason="bad_type", detail=f"got {type(score).__name__}")
    if score.value is None:
        if not score.applicable:
            return Score.not_applicable()
        return Score(None, reason=str(score.reason) or "no_reason", detail=str(score.detail)[:MAX_DETAIL])
    if not score.applicable:
        return Score(None, reason="bad_type", detail="a score that does not apply has a value; it must be None")
    if not all(type(x) is float or isinstance(x, Real) for x in (score.value, *score.components.values())):
        return Score(None, reason="bad_type", detail="a value or a component is not a number")
    if lacking := [component for component in declared if component not in score.components]:
        return Score(None, reason="missing_component", detail=f"the score lacks {', '.join(lacking)}")
    value = finite_float(score.value)
    components = {str(name): x for name, part in score.components.items() if (x := finite_float(part)) is not None}
    if value is None or len(components) < len(score.components):
        return Score(None, reason="not_finite", detail="a value or a component is NaN or infinite")
    return Score(value, components, flags=tuple(map(str, score.flags)))


def finite_float(x: float) -> float | None:
    """``x`` as a float if it is finite in float32, else None; integers may be too large for any float."""
    try:
        converted = float(x)
    except OverflowError:
        return None
    return converted if abs(converted) <= FLOAT32_MAX else None
