"""Checkpoints at rollout boundaries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.callbacks.files import run_directory
from rllava_pl.modules.base import RLModule
from rllava_pl.strategies.checkpoint_io import AtomicCheckpointIO


class RolloutCheckpoint(Callback):
    """Saves the whole run every n passes of the loop, so that ``--ckpt_path`` continues it exactly.

    Lightning's ``ModelCheckpoint`` counts optimizer steps, of which a rollout has several and sometimes none. Files are
    written atomically, and older ones are deleted only after the new one is in place.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make every checkpoint of this run atomic, also those of other callbacks."""
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":  # a plugin of the user's stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save if it is time."""
        done = cast(RLModule, pl_module).rollout_index
        if done % self.every_n_rollouts == 0:
            self._save(trainer, done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        self._save(trainer, cast(RLModule, pl_module).rollout_index)

    def _save(self, trainer: Trainer, rollouts: int) -> None:
        directory = self.directory(trainer)
        path = directory / f"rollout-{rollouts:06d}.ckpt"
        if str(path) != self.last_path:
            trainer.save_checkpoint(path)
            self.last_path = str(path)
        if trainer.is_global_zero:
            self._prune(directory)

    def directory(self, trainer: Trainer) -> Path:
        """Where this run's checkpoints lie."""
        return Path(self.dirpath) if self.dirpath else run_directory(trainer) / "checkpoints"

    def _prune(self, directory: Path) -> None:
        """Delete all but the newest; only files that this callback named are touched."""
        if self.keep:
            named = [path for path in directory.iterdir() if re.fullmatch(r"rollout-\d{6,}\.ckpt", path.name)]
            for path in sorted(named)[: -self.keep]:
                path.unlink(missing_ok=True)
