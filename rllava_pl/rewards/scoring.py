"""One reward and some rollouts to checked scores: whatever goes wrong becomes an unscored sample with its cause.

The same function works in the trainer and in a reward's own process.

=================== ================================================================================================
cause               what happened
=================== ================================================================================================
``exception``       the reward raised
``memory``          it raised ``MemoryError``: in a process of its own, it reached the limit
``bad_type``        it returned something else than a ``Score`` of numbers, or no list of them
``bad_length``      it returned another number of scores than it was given rollouts
``missing``         it returned ``None`` in place of a score
``missing_component`` a declared component is not in the score
``not_finite``      a number is NaN, infinite, or infinite in float32
``timeout``         it took longer than ``timeout_seconds`` and its process was killed
``crash``           its process ended: a segmentation fault, ``os._exit``, or a kill from outside
``pool``            no process could be had
=================== ================================================================================================

Other causes are those that rewards give themselves, as ``Score(None, reason="no_answer")``.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from numbers import Real

from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.types import Reward, Rollout, Score

FLOAT32_MAX = 3.4028234663852886e38
"""Rewards end up in float32 tensors; a larger number would arrive there as infinity."""

MAX_DETAIL = 2000
"""Characters of what happened that are kept."""

SHOWN_FRAMES = 4
"""Places of a traceback that are named, from its end."""


def scored(reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
    """One checked score a rollout, in order; of all exceptions, ``RewardError`` alone is passed on.

    A reward that scores samples one by one loses the faulty one, a reward with its own ``__call__`` the whole call.
    """
    if not scores_one_by_one(reward):
        return _attempt(reward, rollouts)
    assert isinstance(reward, BaseReward)
    declared = tuple(reward.components)
    scores = []
    for rollout in rollouts:
        try:
            scores.append(checked(reward.score(rollout), declared))
        except RewardError:
            raise
        except Exception as error:
            scores.append(failed(error))
    return scores


def scores_one_by_one(reward: Reward) -> bool:
    """Whether a sample's score does not depend on what else is scored in the call."""
    return isinstance(reward, BaseReward) and type(reward).__call__ is BaseReward.__call__


def failed(error: BaseException) -> Score:
    """What an exception makes of a sample: ``ZeroDivisionError: division by zero, at my_reward.py:10 in score``."""
    what = "".join(traceback.format_exception_only(error)).strip()[:MAX_DETAIL]
    frames = traceback.extract_tb(error.__traceback__)[1:][-SHOWN_FRAMES:]  # the first is the caller's
    where = ", in ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    reason = "memory" if isinstance(error, MemoryError) else "exception"
    return Score(None, reason=reason, detail=f"{what}, at {where}" if where else what)


def checked(score: object, declared: tuple[str, ...]) -> Score:
    """The score with plain floats, or an unscored one that says what was wrong."""
    if score is None:
        return Score(None, reason="missing", detail="returned None")
    if not isinstance(score, Score) or not isinstance(score.components, Mapping):
        return Score(None, reason="bad_type", detail=f"got {type(score).__name__}")
    if score.value is None:
        return Score(None, reason=str(score.reason) or "no_reason", detail=str(score.detail)[:MAX_DETAIL])
    if not all(type(x) is float or isinstance(x, Real) for x in (score.value, *score.components.values())):
        return Score(None, reason="bad_type", detail="a value or a component is no number")
    if lacking := [component for component in declared if component not in score.components]:
        return Score(None, reason="missing_component", detail=f"the score lacks {', '.join(lacking)}")
    value = number(score.value)
    components = {str(name): x for name, part in score.components.items() if (x := number(part)) is not None}
    if value is None or len(components) < len(score.components):
        return Score(None, reason="not_finite", detail="a value or a component is NaN or infinite")
    return Score(value, components, flags=tuple(map(str, score.flags)))


def number(x: float) -> float | None:
    """``x`` as a float if it is finite in float32; integers too large for any float are not."""
    try:
        converted = float(x)
    except OverflowError:
        return None
    return converted if abs(converted) <= FLOAT32_MAX else None


def _attempt(reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
    """All samples in one call."""
    try:
        scores: object = reward(rollouts)
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            fault = Score(None, reason="bad_type", detail=f"returned {type(scores).__name__}, not a list of Score")
        elif len(scores) != len(rollouts):
            detail = f"returned {len(scores)} scores for {len(rollouts)} rollouts"
            fault = Score(None, reason="bad_length", detail=detail)
        else:
            declared = tuple(getattr(reward, "components", ()))
            return [checked(score, declared) for score in scores]
    except RewardError:
        raise
    except Exception as error:
        fault = failed(error)
    return [fault] * len(rollouts)
