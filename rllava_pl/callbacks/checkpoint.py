"""Checkpoints at rollout boundaries."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import remove, remove_leftovers, temporary_beside
from rllava_pl.distributed.collectives import world_size
from rllava_pl.modules import PolicyModule
from rllava_pl.strategies import RLStrategyMixin

log = logging.getLogger(__name__)

NAME = r"rollout-\d{6,}\.ckpt"
"""File names of this callback's checkpoints; nothing else is ever deleted."""


class RolloutCheckpoint(Callback):
    """Saves the complete run every n rollouts, so that ``--ckpt_path last`` resumes it exactly.

    Lightning's ``ModelCheckpoint`` counts optimizer steps, of which a rollout has several and sometimes none. Older
    checkpoints are deleted only after the new one is complete. The run is also saved at its end, and when SIGTERM or
    SIGUSR1 ends it. If a checkpoint cannot be written during training, for instance to a full disk, a warning is logged
    and training continues; at the end of the run this is an error.

    Args:
        dirpath: Directory of the checkpoints; by default ``checkpoints`` in the run's folder.
        every_n_rollouts: Rollouts between two checkpoints.
        keep: Number of newest checkpoints to keep; 0 keeps all.
    """

    def __init__(self, dirpath: str = "", every_n_rollouts: int = 10, keep: int = 2) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"every_n_rollouts is {every_n_rollouts}; it must be at least 1")
        if keep < 0:
            raise ValueError(f"keep is {keep}; use 0 to keep all checkpoints, or the number of newest ones to keep")
        self.dirpath = dirpath
        self.every_n_rollouts = every_n_rollouts
        self.keep = keep
        self.last_path = ""
        self._saved = (-1, 0)
        """Rollouts, and generation rounds in the group buffer, of the newest checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove unfinished files of a killed process."""
        directory = self.directory(trainer)  # collective
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(directory, NAME)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save every n rollouts."""
        module = cast(PolicyModule, pl_module)
        rollouts = module.state.rollouts
        if rollouts % self.every_n_rollouts or self._saved[0] == rollouts:
            return
        try:
            self._save(trainer, module)
        except OSError as error:
            if world_size() > 1 and not isinstance(trainer.strategy, RLStrategyMixin):  # one rank alone has the error
                raise
            log.warning("no checkpoint after %d rollouts, training continues: %s", rollouts, error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        self._save(trainer, cast(PolicyModule, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a run that a signal ends; after an error the state in memory may be inconsistent."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or not isinstance(exception, SIGTERMException):
            return
        try:
            self._save(trainer, cast(PolicyModule, pl_module))
        except OSError as error:  # raising it would skip later callbacks, which set the exit code and requeue the job
            kept = f"the last checkpoint is {shown(self.last_path)}" if self.last_path else "there is no checkpoint"
            log.error("stopped by a signal, not saved: %s; %s", error, kept)
        else:
            if trainer.is_global_zero:
                log.warning("stopped by a signal, saved to %s; resume with --ckpt_path last", shown(self.last_path))

    def directory(self, trainer: Trainer) -> Path:
        """Directory of this run's checkpoints."""
        return Path(self.dirpath).expanduser() if self.dirpath else run_directory(trainer) / "checkpoints"

    def newest(self, trainer: Trainer) -> str | None:
        """The newest complete checkpoint, for ``Trainer.fit(ckpt_path=...)``; None if there is none yet.

        Where loggers number the runs, earlier numbers are searched as well, since a resumed run has a new one.

        Raises:
            DamagedCheckpoint: There are checkpoints, but none is complete.
        """
        directories = [self.directory(trainer)]
        run = directories[0].parent
        if not self.dirpath and re.fullmatch(r"version_\d+", run.name):
            directories = [version / "checkpoints" for version in sorted(run.parent.glob("version_*"))]
        if trainer.is_global_zero:
            for directory in directories:
                remove_leftovers(directory, NAME)
        path = manifest.newest(path for directory in directories for path in _checkpoints(directory))
        return None if path is None else str(path)

    def _save(self, trainer: Trainer, module: PolicyModule) -> None:
        directory = self.directory(trainer)
        buffer = getattr(module, "group_buffer", None)  # supervised methods have none
        state = (module.state.rollouts, buffer.rounds if buffer else 0)
        if self._saved != state:
            path = directory / f"rollout-{module.state.rollouts:06d}.ckpt"
            with module.phases("save"):
                trainer.save_checkpoint(path)
            self._saved, self.last_path = state, str(path)
        if not trainer.is_global_zero or not self.keep:
            return
        ages: dict[Path, int] = {}
        for path in _checkpoints(directory):
            with suppress(manifest.DamagedCheckpoint):  # these are neither counted nor deleted
                ages[path] = manifest.read(path).saved_at_ns
        for path in sorted(ages, key=ages.__getitem__)[: -self.keep]:
            renamed = temporary_beside(path)  # a half-deleted directory must not look like a damaged checkpoint
            remove(renamed)
            path.rename(renamed)
            remove(renamed)


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*") if re.fullmatch(NAME, path.name))
