"""Progress of the run in rollouts, in a terminal and in a log file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text
from torch import Tensor

from rllava_pl.modules import PolicyModule

RECENT = 20
"""Rollouts over which ``s/rollout`` is averaged."""
SHOWN = {"reward": ("train/reward", ".3f"), "accuracy": ("train/reward_accuracy", ".3f"), "kl": ("train/kl", ".2g")}
"""Label to metric and format; of the last rollout, if it was logged."""


class Pace:
    """Seconds per rollout and remaining time, from the times at which rollouts ended.

    Example: a run is resumed at 9 of 20 rollouts, and rollouts 10, 11, 12 end after 4 s, 6 s and 8 s. A rollout took
    8/3 s, so 8 x 8/3 = 21.3 s remain.

    Args:
        total: Rollouts of the whole run; ``math.inf`` if unknown.
        done: Rollouts that ended before this process.
        now: Time in seconds at which this process started or resumed the run.
    """

    def __init__(self, total: float, done: int, now: float) -> None:
        self.total = total
        self.done = done
        self._first = (done, now)
        self._recent = deque([now], maxlen=RECENT + 1)

    def tick(self, done: int, now: float) -> None:
        """``done`` rollouts have ended by ``now``."""
        self.done = done
        self._recent.append(now)

    @property
    def seconds(self) -> float:
        """Mean of the last ``RECENT`` rollouts, including everything between them; nan before the first."""
        steps = len(self._recent) - 1
        return (self._recent[-1] - self._recent[0]) / steps if steps else math.nan

    @property
    def eta_seconds(self) -> float:
        """Remaining rollouts times the mean of this process, including validation; nan if unknown."""
        done, start = self._first
        if self.done == done or math.isinf(self.total):
            return math.nan
        return (self.total - self.done) * (self._recent[-1] - start) / (self.done - done)

    def __str__(self) -> str:
        """``0.21 s/rollout  ETA 0:38``; empty before the first rollout."""
        if math.isnan(self.seconds):
            return ""
        eta = self.eta_seconds
        return f"{self.seconds:.2f} s/rollout" + ("" if math.isnan(eta) else f"  ETA {clock(round(eta))}")

    @property
    def fraction(self) -> str:
        """``120/300``."""
        return f"{self.done}" if math.isinf(self.total) else f"{self.done}/{int(self.total)}"


def clock(seconds: int) -> str:
    """``0:38``, ``12:05`` or ``3:00:17``."""
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(logged: Mapping[str, Tensor]) -> str:
    """``reward 0.734  accuracy 0.812  kl 0.0021``; metrics that were not logged are left out."""
    return "  ".join(f"{label} {float(logged[name]):{form}}" for label, (name, form) in SHOWN.items() if name in logged)


class RolloutProgressBar(RichProgressBar):
    """Shows rollouts done, reward, accuracy and KL of the last one, seconds per rollout and remaining time.

    Lightning's own bar counts the batches of an epoch, which do not measure progress here. In a terminal this is one
    bar; in a file it is a plain line every ``every_n_rollouts`` rollouts, without control characters::

        rollout 120/300  reward 0.734  accuracy 0.812  kl 0.0021  0.21 s/rollout  ETA 0:38

    Args:
        every_n_rollouts: Rollouts between two plain lines; 0: none. The bar in a terminal is updated at every rollout.
    """

    def __init__(self, every_n_rollouts: int = 10) -> None:
        if every_n_rollouts < 0:
            raise ValueError(f"every_n_rollouts is {every_n_rollouts}; use 0 for no plain lines or a positive number")
        super().__init__(refresh_rate=4)
        self.every_n_rollouts = every_n_rollouts
        self.pace = Pace(math.inf, 0, 0.0)
        self.metrics = ""
        self._live = False
        self._printed = -1

    @property
    def is_enabled(self) -> bool:
        """Whether a bar is drawn: on rank zero, and only where the output can be redrawn."""
        return super().is_enabled and self._live

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the output goes."""
        super().setup(trainer, pl_module, stage)
        console = Console()
        self._live = console.is_jupyter or console.is_interactive

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how many rollouts are done, which after a resume are not 0."""
        module = cast(PolicyModule, pl_module)
        self.pace = Pace(module.max_rollouts or math.inf, module.state.rollouts, monotonic())
        super().on_train_start(trainer, pl_module)
        if self.is_enabled:
            self.train_progress_bar_id = self._add_task(self.pace.total, "Rollouts")
            self._update(self.train_progress_bar_id, self.pace.done, hard=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One bar covers all epochs."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Start the clock at the first rollout, after what other callbacks do in ``on_train_start``."""
        if math.isnan(self.pace.seconds):
            self.pace = Pace(self.pace.total, self.pace.done, monotonic())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Advance by one rollout."""
        self.pace.tick(cast(PolicyModule, pl_module).state.rollouts, monotonic())
        self.metrics = describe(trainer.callback_metrics)
        self._update(self.train_progress_bar_id, self.pace.done)
        if self.every_n_rollouts and self.pace.done % self.every_n_rollouts == 0:
            self._print_line(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One bar covers all epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop drawing the bar, so that further output is below it."""
        if self.is_enabled:
            self._stop_progress()
        elif self.every_n_rollouts:
            self._print_line(trainer)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Nothing: Lightning's column of metrics would wrap; they are shown behind the pace."""
        return {}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Count, bar, pace and metrics, in 80 characters."""
        theme = self.theme
        bar = CustomBarColumn(
            bar_width=10,
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        return [_Text(self._count), bar, _Text(self._pace)]

    def _count(self, task: Task) -> str:
        """Rollouts of the run, or batches of a validation, test or prediction."""
        if task.id == self.train_progress_bar_id:
            return self.pace.fraction
        return f"{task.description} {int(task.completed)}/{task.total:.0f}"

    def _pace(self, task: Task) -> str:
        return f"{self.pace}  {self.metrics}" if task.id == self.train_progress_bar_id else ""

    def _print_line(self, trainer: Trainer) -> None:
        if self._live or not trainer.is_global_zero or self._printed == self.pace.done:
            return
        self._printed = self.pace.done
        print(f"rollout {self.pace.fraction}  {self.metrics}  {self.pace}", flush=True)


class _Text(ProgressColumn):
    """A column that is cut in a narrow terminal, not wrapped."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(self.text(task))
