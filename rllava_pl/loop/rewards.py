"""Rewards in the loop: counts of what could not be scored, and what the run does about it."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping

import torch

from rllava_pl.distributed.collectives import gather_objects, max_over_ranks
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.rewards import RewardError, RewardOutput, RewardRunner, Scoring, check_unscored


class RewardMonitor:
    """Counts unscored samples by cause, and applies ``scoring.on_error`` and ``scoring.max_unscored``.

    Args:
        scoring: The options.
        metrics: Where counts go.
    """

    def __init__(self, scoring: Scoring, metrics: MetricAccumulator) -> None:
        self.scoring = scoring
        self.metrics = metrics
        self.counts: Counter[str] = Counter()
        self.unscored_fractions: deque[float] = deque(maxlen=scoring.patience)

    def settle(self, output: RewardOutput, runner: RewardRunner, device: torch.device) -> RewardOutput:
        """Count what could not be scored, and handle it as ``scoring.on_error`` says.

        Raises:
            RewardError: ``on_error`` is stop and a sample of any rank has no score; raised on all ranks.
        """
        unscored = torch.tensor(output.unscored, device=device)
        self.metrics.add_total("unscored_samples", unscored)
        self.metrics.add("unscored_fraction", unscored, len(output.rewards))
        found = Counter({f"unscored_{_metric_name(cause)}": n for cause, n in output.causes.items()})
        found += Counter({f"reward_flag_{_metric_name(flag)}": n for flag, n in output.flags.items()})
        found += Counter(reward_restarts=runner.restarts())
        self.counts += found
        self.metrics.add_total("reward_incidents", torch.tensor(found.total(), device=device))
        if self.scoring.on_error == "stop" and max_over_ranks(unscored):
            causes = dict(output.causes) or "on another rank"
            raise RewardError(f"samples without a score: {causes}; scoring.on_error is stop. The log names the prompts")
        return output.zeroed() if self.scoring.on_error == "zero" else output

    def report(self, metrics: dict[str, float], runner: RewardRunner) -> None:
        """Add counts by cause and latencies to the metrics of a rollout. Collective if anything was counted."""
        if metrics.pop("train/reward_incidents", 0.0):
            total = sum(gather_objects(self.counts), Counter())
            metrics |= {f"train/{name}": float(number) for name, number in total.items()}
            self.counts.clear()
        metrics |= {f"time/reward_{name}": seconds for name, seconds in runner.latencies().items()}

    def check(self, metrics: Mapping[str, float]) -> None:
        """Stop if too many samples had no score for too long; all ranks see the same metrics.

        Raises:
            RewardError: More than ``scoring.max_unscored`` in ``scoring.patience`` rollouts in a row.
        """
        self.unscored_fractions.append(metrics.get("train/unscored_fraction", 0.0))
        check_unscored(list(self.unscored_fractions), self.scoring)


def _metric_name(text: str) -> str:
    """Names that a reward chose, cut to what a metric can be called."""
    return re.sub(r"[^a-z0-9_]", "_", text[:32].lower())
