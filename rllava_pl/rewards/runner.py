"""The rewards of a run, each where it belongs: in the trainer, or in processes of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.rewards.isolation.pool import RewardPool
from rllava_pl.rewards.isolation.spec import NotIsolable, Recipe, recipe
from rllava_pl.rewards.output import Judgement, judge
from rllava_pl.rewards.scoring import scores_one_by_one
from rllava_pl.types import Reward, Rollout, Score

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judging:
    """How rewards are run, and what becomes of samples that they could not score.

    Args:
        isolation: Where rewards run. auto: in processes of their own, but for those whose class says
            ``isolation = "none"``, being fast and total, and those that cannot be built again elsewhere, with a
            warning; process: the same, but the latter are refused; none: all in the trainer, where an exception costs
            a sample and a hang the run.
        timeout_seconds: Longest time for one sample, unless its reward says otherwise.
        memory_gib: What a reward's process may take on top of what it starts with.
        workers: Processes that score at a time, on each rank.
        recycle_after: Samples after which a process makes room for a fresh one.
        on_error: What a sample without a score does: drop_group leaves out its group, zero counts it as 0, stop ends
            the run. It is counted in any case.
        max_unscored: The run ends when more than this part of the samples had no score in ``patience`` rollouts in a
            row; 1: never.
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
            if getattr(self, name) <= 0:
                raise ValueError(f"judging.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"judging.max_unscored is {self.max_unscored}; it is a part of the samples, from 0 to 1")


class Panel:
    """All rewards of a run; call it to judge rollouts, close it at the end.

    Processes are started when it is made, so that they import what they need while the trainer loads its model.

    Args:
        rewards: Of the run.
        judging: How to run them.

    Raises:
        NotIsolable: ``isolation`` is process, and a reward cannot be built elsewhere.
    """

    def __init__(self, rewards: Sequence[Reward], judging: Judging) -> None:
        self.rewards = rewards
        recipes: list[Recipe] = []
        self.members: list[Reward] = []
        for reward in rewards:
            found = _recipe_if_wanted(reward, judging)
            member = reward if found is None else cast(Reward, _Pooled(reward, len(recipes), self, judging))
            self.members.append(member)
            if found is not None:
                recipes.append(found)
            elif isinstance(reward, BaseReward):
                reward.load()
        self.pool = _pool(recipes, judging) if recipes else None
        if self.pool is not None:
            self.pool.start()

    def __call__(self, rollouts: Sequence[Rollout]) -> Judgement:
        """What the rewards say together."""
        return judge(self.members, rollouts)

    def take_respawns(self) -> int:
        """Processes replaced after a fault since the last call."""
        if self.pool is None:
            return 0
        since, self.pool.respawns = self.pool.respawns, 0
        return since

    def latencies(self) -> dict[str, float]:
        """Median and 99th percentile of the seconds a sample took since the last call, by reward."""
        found = {}
        for member in self.members:
            if isinstance(member, _Pooled) and member.seconds:
                ordered, member.seconds = sorted(member.seconds), []
                for percent in (50, 99):
                    found[f"{member.name}/p{percent}_seconds"] = ordered[(len(ordered) - 1) * percent // 100]
        return found

    def close(self) -> None:
        """End all processes; idempotent."""
        if self.pool is not None:
            self.pool.close()


class _Pooled:
    """A reward whose work is done elsewhere; in all else it is the reward."""

    def __init__(self, reward: Reward, number: int, panel: Panel, judging: Judging) -> None:
        assert isinstance(reward, BaseReward)
        self.reward, self.number, self.panel = reward, number, panel
        self.name, self.components = reward.name, reward.components
        self.timeout_seconds = reward.timeout_seconds or judging.timeout_seconds
        self.seconds: list[float] = []

    @property
    def weight(self) -> float:
        """Of the reward; it may change in a run."""
        return self.reward.weight

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout, whatever happens."""
        scores, seconds = self.panel.pool.score(
            self.number,
            rollouts,
            timeout_seconds=self.timeout_seconds,
            images=self.reward.needs_images,
            together=not scores_one_by_one(self.reward),
        )
        self.seconds += seconds
        return [self._blamed(score) for score in scores] if self.reward.text_at_fault else scores

    def _blamed(self, score: Score) -> Score:
        """What a text did to its grader makes it wrong, with a flag."""
        if score.value is not None or score.reason not in ("timeout", "crash", "memory"):
            return score
        return Score(0.0, dict.fromkeys(self.components, 0.0), flags=(f"grader_{score.reason}",))


def _recipe_if_wanted(reward: Reward, judging: Judging) -> Recipe | None:
    """How to build a reward elsewhere, or None if it is to run here."""
    wanted = getattr(type(reward), "isolation", "process") == "process"
    if judging.isolation == "none" or not wanted:
        return None
    try:
        return recipe(reward)
    except NotIsolable as error:
        if judging.isolation == "process":
            raise
        log.warning("%s; it runs in the trainer, which it can hang or end", error)
        return None


def _pool(recipes: Sequence[Recipe], judging: Judging) -> RewardPool:
    return RewardPool(
        recipes,
        workers=judging.workers,
        memory_bytes=int(judging.memory_gib * 2**30),
        recycle_after=judging.recycle_after,
    )


def check_unscored(shares: Sequence[float], judging: Judging) -> None:
    """End a run whose rewards fail for too long.

    Args:
        shares: Parts of the samples without a score, of the last rollouts.
        judging: Gives limit and patience.

    Raises:
        RewardError: Above the limit in ``patience`` rollouts in a row.
    """
    last = shares[-judging.patience :]
    if len(last) == judging.patience and min(last) > judging.max_unscored:
        told = ", ".join(f"{share:.1%}" for share in last)
        raise RewardError(
            f"{told} of the samples had no score in the last {len(last)} rollouts, more than judging.max_unscored "
            f"({judging.max_unscored:.1%}): a reward does not work on this data; the log names causes and prompts"
        )
