"""Rewards in the loop: their processes, and what becomes of samples that they could not score."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence

import torch

from rllava_pl.distributed.collectives import gather_objects, max_over_ranks
from rllava_pl.loop.phases import Phases
from rllava_pl.rewards.base import RewardError
from rllava_pl.rewards.output import Judgement, judge
from rllava_pl.rewards.runner import Panel, check_unscored
from rllava_pl.types import Rollout


class Judged(Phases):
    """The rewards of ``RLModule``."""

    panel: Panel | None = None

    def open_panel(self) -> None:
        """Start the processes of rewards that have their own."""
        self.close_panel()
        self.panel = Panel(self.rewards, self.judging)
        self.incidents: Counter[str] = Counter()
        self.unscored_shares: deque[float] = deque(maxlen=self.judging.patience)

    def close_panel(self) -> None:
        """End them."""
        if self.panel is not None:
            self.panel.close()
        self.panel = None

    def ask_rewards(self, rollouts: Sequence[Rollout]) -> Judgement:
        """What the rewards say; outside a Trainer's run they all work in this process."""
        if self.panel is None or self.panel.rewards is not self.rewards:
            return judge(self.rewards, rollouts)
        return self.panel(rollouts)

    def settle(self, judgement: Judgement) -> Judgement:
        """Count what could not be scored, and do with it what ``judging.on_error`` says.

        Raises:
            RewardError: It says stop; on all ranks together.
        """
        unscored = torch.tensor(judgement.unscored, device=self.policy.device)
        self.tally.add_total("unscored_samples", unscored)
        self.tally.add("unscored_fraction", unscored, len(judgement.rewards))
        if self.panel is not None:
            self._note_incidents(judgement, self.panel)
        if self.judging.on_error == "stop" and max_over_ranks(unscored):
            causes = dict(judgement.causes) or "on another rank"
            raise RewardError(f"samples without a score: {causes}; judging.on_error is stop. The log names the prompts")
        return judgement.zeroed() if self.judging.on_error == "zero" else judgement

    def _note_incidents(self, judgement: Judgement, panel: Panel) -> None:
        """By cause and by flag, for the metrics; names that a reward chose are cut to what a metric can be called."""
        found = Counter({f"unscored/{_plain(cause)}": n for cause, n in judgement.causes.items()})
        found += Counter({f"reward_flags/{_plain(flag)}": n for flag, n in judgement.flags.items()})
        found += Counter(reward_respawns=panel.take_respawns())
        self.incidents += found
        self.tally.add_total("incidents", torch.tensor(found.total(), device=self.policy.device))

    def report_incidents(self, metrics: dict[str, float]) -> None:
        """Add what went wrong since the last report, by name, and how long rewards took. Collective if anything did."""
        if metrics.pop("train/incidents", 0.0):
            total = sum(gather_objects(self.incidents), Counter())
            metrics |= {f"train/{name}": float(number) for name, number in total.items()}
            self.incidents.clear()
        if self.panel is not None:
            metrics |= {f"time/reward/{name}": seconds for name, seconds in self.panel.latencies().items()}

    def check_rewards(self, metrics: dict[str, float]) -> None:
        """Stop if too much had no score for too long; all ranks see the same metrics.

        Raises:
            RewardError: More than ``judging.max_unscored`` in ``judging.patience`` rollouts in a row.
        """
        self.unscored_shares.append(metrics.get("train/unscored_fraction", 0.0))
        check_unscored(list(self.unscored_shares), self.judging)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9_]", "_", name[:32].lower())
