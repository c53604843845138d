"""Ending a run on a signal, at a point where what is in memory can be saved as it was at the last boundary.

Weights, moments and counters are those of the boundary until the first optimizer step of a pass. So a run ends at the
beginning of a phase, between micro-batches or inside a rollout up to that step, and after it at the end of the pass.
"""

from __future__ import annotations

from typing import Any, Protocol

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rllava_pl.distributed import signals
from rllava_pl.distributed.collectives import world_size
from rllava_pl.loop.state import RunState


class Restorable(Protocol):
    """A part that a pass changes before its first optimizer step."""

    def snapshot(self) -> Any:  # noqa: ANN401 - only the part itself reads it
        """This moment."""

    def rollback(self, snapshot: Any) -> None:  # noqa: ANN401
        """Forget what was added since the snapshot."""


class Interruption:
    """Ends the run where a signal has arrived, after restoring the last boundary.

    Args:
        state: Counters of the run.
        parts: What a pass changes before its first optimizer step.
    """

    def __init__(self, state: RunState, parts: list[Restorable]) -> None:
        self.state = state
        self.parts = parts
        self._boundary: tuple[float, list[object]] | None = None

    def phase_begins(self, name: str) -> None:
        """Remember the boundary before a rollout; end the run before a phase if a signal has arrived."""
        if name == "rollout":
            self._boundary = (self.state.kl_factor, [part.snapshot() for part in self.parts])
        if name in ("rollout", "validate"):
            signals.stop_if_signalled()
        elif name in ("reward", "logprobs", "update") and self.state.before_first_update:
            self._stop_if_signalled()

    def between_micro_batches(self) -> None:
        """End the run here; ranks may have different numbers of micro-batches, and then do not."""
        if world_size() == 1 and self.state.before_first_update:
            self._stop_if_signalled()

    def _stop_if_signalled(self) -> None:
        try:
            signals.stop_if_signalled()
        except signals.Interrupted:
            if self._boundary is not None:
                self.state.kl_factor, snapshots = self._boundary
                for part, snapshot in zip(self.parts, snapshots, strict=True):
                    part.rollback(snapshot)
            raise


class ExitHandler(Callback):
    """Ends an interrupted run: after all callbacks have saved, the earlier signal handlers are called."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the exit code, and let Lightning put a SLURM job back into its queue."""
        if isinstance(exception, signals.Interrupted):
            signals.call_previous_handler(exception.number)
        if isinstance(exception, SIGTERMException):
            # Lightning's launcher kills all other processes when one that it started ends with an error.
            environment = getattr(trainer.strategy, "cluster_environment", None)
            launched = isinstance(environment, LightningEnvironment) and trainer.global_rank > 0
            exception.code = 0 if launched else signals.EXIT_CODE
