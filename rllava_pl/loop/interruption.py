"""Leaving a run that the system asks to end, where what is in memory can be saved as it was at the last boundary.

Weights, moments and counters are those of the boundary until the first optimizer step of a pass. So a run is left at
the beginning of a phase, between micro-batches and inside a rollout up to that step, and behind it at the end of the
pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rllava_pl.distributed import signals
from rllava_pl.distributed.collectives import world_size
from rllava_pl.loop.judging import Judged
from rllava_pl.loop.tally import TallyState
from rllava_pl.types import Experience


class Boundary(NamedTuple):
    """What a pass changes before its first optimizer step."""

    kl_factor: float
    parts: list[Experience]
    tally: TallyState


class Interruption(Judged):
    """Where ``RLModule`` can be left."""

    _boundary: Boundary | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As ever, unless the run is to be left before it."""
        if name == "rollout":
            self._boundary = Boundary(self.kl_controller.coef, [*self.collection.parts], self.tally.state())
        if name in ("rollout", "validate"):
            signals.leave_if_asked()
        elif name in ("reward", "evaluate", "update") and self._undone:
            self._leave_if_asked()
        with super().phase(name):
            yield

    def pause(self) -> None:
        """Leave between two micro-batches; ranks may have different numbers of them, and then go on."""
        if world_size() == 1 and self._undone:
            self._leave_if_asked()

    @property
    def _undone(self) -> bool:
        """Whether the pass has made no optimizer step yet."""
        return self.weight_version == self.rollout_version

    def _leave_if_asked(self) -> None:
        try:
            signals.leave_if_asked()
        except signals.Interrupted:
            self._return_to_boundary()
            raise

    def _return_to_boundary(self) -> None:
        if self._boundary is not None:
            self.kl_controller.coef = self._boundary.kl_factor
            self.collection.parts = self._boundary.parts
            self.tally.restore(self._boundary.tally)

    def on_train_start(self) -> None:
        """Take note of signals from now on, in place of Lightning's handlers, which act in the middle of a step."""
        signals.watch()

    on_validation_start = on_test_start = on_predict_start = on_train_start


class LastWords(Callback):
    """Ends an interrupted run: after all callbacks have saved, the handlers that were there before are called."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the exit code, and let Lightning put a SLURM job back into its queue."""
        if isinstance(exception, signals.Interrupted):
            signals.pass_on(exception.number)
        if isinstance(exception, SIGTERMException):
            exception.code = 0 if _is_child(trainer) else signals.EXIT_CODE


def _is_child(trainer: Trainer) -> bool:
    """Whether Lightning started this process, and would kill all others at once if it ended with an error."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.global_rank > 0
