"""The rewards of a run, each where it belongs: in the trainer, or in worker processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.isolation.pool import RewardPool
from rllava_pl.rewards.isolation.spec import NotIsolableError, RewardSpec
from rllava_pl.rewards.output import RewardOutput, check_rewards, combine_scores, reward_name
from rllava_pl.rewards.scoring import Scoring, is_samplewise, score_rollouts
from rllava_pl.types import Reward, Rollout, Score

log = logging.getLogger(__name__)


class RewardRunner:
    """Scores rollouts with all rewards of a run.

    Until ``start`` and after ``close`` all rewards work in this process, and the runner holds no process and can be
    copied. In between, rewards that need isolation work in processes that can be killed.

    Args:
        rewards: Rewards to add up.
        scoring: How to run them.
    """

    def __init__(self, rewards: Sequence[Reward], scoring: Scoring) -> None:
        self.rewards = rewards
        self.scoring = scoring
        self._pool: RewardPool | None = None
        self._isolated: list[int] = []
        """Positions in ``rewards`` of those in the pool, in the order of the pool."""
        self._loaded: set[int] = set()
        self._seconds: dict[str, list[float]] = {}

    def start(self) -> None:
        """Start the processes of isolated rewards, without waiting for them; load the other rewards here.

        Raises:
            NotIsolableError: ``scoring.isolation`` is process, and a reward cannot be built in another process.
        """
        self.close()
        specs = {k: spec for k, reward in enumerate(self.rewards) if (spec := self._spec(reward))}
        if specs:
            self._isolated = list(specs)
            self._pool = RewardPool(list(specs.values()), self.scoring)
            self._pool.start()
        self._load()

    def __call__(self, rollouts: Sequence[Rollout]) -> RewardOutput:
        """Weighted sum of the rewards; see ``compute_rewards``."""
        check_rewards(self.rewards)
        return combine_scores(self.rewards, rollouts, self.scores(rollouts))

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[Score]]:
        """One checked score per rollout for each reward, before weights."""
        self._load()
        return [self._score(position, reward, rollouts) for position, reward in enumerate(self.rewards)]

    def restarts(self) -> int:
        """Number of processes replaced after a fault since the last call."""
        if self._pool is None:
            return 0
        count, self._pool.restarts = self._pool.restarts, 0
        return count

    def latencies(self) -> dict[str, float]:
        """Median and 99th percentile of the seconds per sample since the last call: ``{"math_p50_seconds": 0.01}``."""
        recent, self._seconds = self._seconds, {}
        return {
            f"{name}_p{percent}_seconds": sorted(seconds)[(len(seconds) - 1) * percent // 100]
            for name, seconds in recent.items()
            for percent in (50, 99)
        }

    def close(self) -> None:
        """End all processes; idempotent."""
        if self._pool is not None:
            self._pool.close()
        self._pool, self._isolated = None, []

    def _spec(self, reward: Reward) -> RewardSpec | None:
        """How to build a reward in another process, or None if it is to run here."""
        if "none" in (self.scoring.isolation, getattr(type(reward), "isolation", "process")):
            return None
        try:
            return RewardSpec.of(reward)
        except NotIsolableError as error:
            if self.scoring.isolation == "process":
                raise
            log.warning("%s; it runs in the trainer, where a hang or a crash ends the run", error)
            return None

    def _load(self) -> None:
        """Call ``load`` once on every reward that works here."""
        for position, reward in enumerate(self.rewards):
            if isinstance(reward, BaseReward) and position not in self._loaded.union(self._isolated):
                reward.load()
                self._loaded.add(position)

    def _score(self, position: int, reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
        if self._pool is None or position not in self._isolated or not isinstance(reward, BaseReward):
            return score_rollouts(reward, rollouts)
        scores, seconds = self._pool.score(
            self._isolated.index(position),
            rollouts,
            timeout_seconds=reward.timeout_seconds or self.scoring.timeout_seconds,
            images=reward.needs_images,
            together=not is_samplewise(reward),
        )
        if seconds:
            self._seconds.setdefault(reward_name(reward), []).extend(seconds)
        if not reward.text_at_fault:
            return scores
        wrong = dict.fromkeys(reward.components, 0.0)
        return [
            Score(0.0, wrong, flags=(f"grader_{score.reason}",))
            if score.value is None and score.reason in ("timeout", "crash", "memory")
            else score
            for score in scores
        ]
