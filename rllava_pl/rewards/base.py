"""The base class of rewards."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

from rllava_pl.types import Rollout, Score

Isolation = Literal["process", "none"]


class RewardError(RuntimeError):
    """Rewards are broken in a way that must end the run."""


class BaseReward(ABC):
    """Scores rollouts one by one; subclass it and write ``score``.

    The score is a pure function of the rollout: no printing, no network, no randomness. For a row that the reward is
    not meant for, return ``Score.not_applicable()``; for one that it cannot score, ``Score(None, reason="...")``. In a
    run it works in a worker process, so that a text that makes it hang, crash or exhaust memory costs a sample and
    not the run; faults are counted by cause.

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
    isolation: Isolation = "process"
    """``none``: runs in the trainer, for rewards that need its GPU, or that are fast and never fail. Not inherited: a
    subclass may be neither."""
    timeout_seconds: float | None = None
    """Longest time for one sample in a worker process; None: ``scoring.timeout_seconds``."""
    needs_images: bool = False
    """Whether images are sent to the worker process; without it, reading them there raises."""
    text_at_fault: bool = False
    """True for a grader that only a hostile text can make hang, crash or exhaust memory: such a sample counts as wrong
    (value and components 0, flag ``grader_timeout``, ...). Otherwise a policy could erase bad groups by such texts."""
    made_with: tuple[tuple[object, ...], dict[str, object]]
    """Constructor arguments, from which the reward is built in its process."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Remember the arguments."""
        reward = super().__new__(cls)
        reward.made_with = (args, kwargs)
        return reward

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Derive ``name`` and check ``components`` when the class is defined, not when it first scores."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)
        if "isolation" not in cls.__dict__:
            cls.isolation = "process"
        if isinstance(cls.components, str):
            raise TypeError(f'{cls.__name__}.components is a string; write components = ("{cls.components}",)')

    def __init__(self, weight: float = 1.0) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"{type(self).__name__}: weight is {weight}; it must be a finite number")
        self.weight = weight

    def load(self) -> None:  # noqa: B027 - most rewards have nothing to do here
        """Load what is slow or large; called once in the process where the reward works, before its first sample."""

    @abstractmethod
    def score(self, rollout: Rollout) -> Score:
        """Score one rollout."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order. Override it to score samples together; then a fault costs all of them."""
        return [self.score(rollout) for rollout in rollouts]


def snake_case(class_name: str) -> str:
    """``AnswerTagReward`` -> ``answer_tag``."""
    stem = class_name.removesuffix("Reward") or class_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", stem).lower()
