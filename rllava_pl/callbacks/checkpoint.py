"""Checkpoints at rollout boundaries."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import remove, remove_leftovers, temporary_beside
from rllava_pl.distributed.collectives import world_size
from rllava_pl.modules.base import RLModule
from rllava_pl.strategies import RLStrategyMixin

log = logging.getLogger(__name__)

NAME = r"rollout-\d{6,}\.ckpt"
"""Of the checkpoints of this callback; nothing else is ever deleted."""


class RolloutCheckpoint(Callback):
    """Saves the whole run every n passes of the loop, so that ``--ckpt_path last`` continues it exactly.

    Lightning's ``ModelCheckpoint`` counts optimizer steps, of which a rollout has several and sometimes none. Older
    checkpoints are deleted only after the new one is in place. The run is also saved at its end and when a SIGTERM or
    SIGUSR1 asks it to leave. If a checkpoint cannot be written on the way, such as to a full disk, the run goes on with
    a warning and the older ones; at the end that is an error.

    Args:
        dirpath: Where to; by default ``checkpoints`` in the run's folder.
        every_n_rollouts: Passes of the loop between two checkpoints.
        keep: Number of newest checkpoints that stay; 0 keeps all.
    """

    def __init__(self, dirpath: str = "", every_n_rollouts: int = 10, keep: int = 2) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"every_n_rollouts is {every_n_rollouts}; checkpoints are at least one rollout apart")
        if keep < 0:
            raise ValueError(f"keep is {keep}; use 0 to keep all checkpoints or the number of newest ones that stay")
        self.dirpath = dirpath
        self.every_n_rollouts = every_n_rollouts
        self.keep = keep
        self.last_path = ""
        self._saved = (-1, 0)
        """Rollouts, and rounds of an unfinished collection, that the newest checkpoint holds."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a killed process left half written."""
        directory = self.directory(trainer)
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(directory, NAME)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save if it is time."""
        module = cast(RLModule, pl_module)
        if module.rollout_index % self.every_n_rollouts or self._saved[0] == module.rollout_index:
            return
        try:
            self._save(trainer, module)
        except OSError as error:
            if world_size() > 1 and not isinstance(trainer.strategy, RLStrategyMixin):  # the other ranks do not know
                raise
            log.warning("no checkpoint after %d rollouts, training goes on: %s", module.rollout_index, error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        self._save(trainer, cast(RLModule, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a run that was asked to leave; after an error nobody knows what is in memory."""
        if not isinstance(exception, SIGTERMException) or not _trains(trainer):
            return
        try:
            self._save(trainer, cast(RLModule, pl_module))
        except OSError as error:  # raised, it would keep the callbacks behind from leaving: exit code, SLURM's queue
            kept = f"the last checkpoint is {shown(self.last_path)}" if self.last_path else "this run has none"
            log.error("stopped by a signal, and not saved: %s; %s", error, kept)
        else:
            if trainer.is_global_zero:
                log.warning("stopped by a signal, saved in %s; go on with --ckpt_path last", shown(self.last_path))

    def directory(self, trainer: Trainer) -> Path:
        """Where this run's checkpoints lie."""
        return Path(self.dirpath).expanduser() if self.dirpath else run_directory(trainer) / "checkpoints"

    def newest(self, trainer: Trainer) -> str | None:
        """The newest whole checkpoint, for ``Trainer.fit(ckpt_path=...)``; None if there is none yet.

        Where loggers number the runs, those of earlier numbers count too: a run that goes on has a new one.

        Raises:
            DamagedCheckpoint: There are some, and none is whole.
        """
        directories = list(self._directories(trainer))
        if trainer.is_global_zero:
            for directory in directories:
                remove_leftovers(directory, NAME)
        path = manifest.newest(path for directory in directories for path in _checkpoints(directory))
        return None if path is None else str(path)

    def _directories(self, trainer: Trainer) -> Iterator[Path]:
        directory = self.directory(trainer)
        run = directory.parent
        if not self.dirpath and re.fullmatch(r"version_\d+", run.name):
            yield from (version / directory.name for version in sorted(run.parent.glob("version_*")))
        else:
            yield directory

    def _save(self, trainer: Trainer, module: RLModule) -> None:
        directory = self.directory(trainer)
        state = (module.rollout_index, module.collection.rounds)
        if self._saved != state:
            path = directory / f"rollout-{module.rollout_index:06d}.ckpt"
            with module.phase("save"):
                trainer.save_checkpoint(path)
            self._saved, self.last_path = state, str(path)
        if trainer.is_global_zero and self.keep:
            self._prune(directory)

    def _prune(self, directory: Path) -> None:
        """Delete all but the newest; what is damaged counts for nothing and stays."""
        ages: dict[Path, int] = {}
        for path in _checkpoints(directory):
            try:
                ages[path] = manifest.read(path).saved_at_ns
            except manifest.DamagedCheckpoint:
                continue
        for path in sorted(ages, key=ages.__getitem__)[: -self.keep]:
            doomed = temporary_beside(
                path
            )  # a directory takes time to delete, and half of it must not look like damage
            remove(doomed)
            path.rename(doomed)
            remove(doomed)


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(NAME, path.name))


def _trains(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
