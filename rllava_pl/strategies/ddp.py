"""Data parallelism for RL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rllava_pl.checkpoint.atomic import raise_on_all_ranks


class RLStrategyMixin:
    """Calls the steps on the module itself instead of inside the wrapper's forward.

    Stock strategies run ``training_step`` as one forward of DDP, FSDP or DeepSpeed. Here a step is a whole pass of the
    RL loop with many forwards, each of which must go through the wrapper (``trainer.strategy.model``).
    """

    def training_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """One pass of the loop."""
        with self.precision_plugin.train_step_context():  # type: ignore[attr-defined]
            return self.lightning_module.training_step(*args, **kwargs)  # type: ignore[attr-defined, no-any-return]

    def validation_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Rollouts for evaluation."""
        with self.precision_plugin.val_step_context():  # type: ignore[attr-defined]
            return self.lightning_module.validation_step(*args, **kwargs)  # type: ignore[attr-defined, no-any-return]

    def test_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Rollouts for the test."""
        with self.precision_plugin.test_step_context():  # type: ignore[attr-defined]
            return self.lightning_module.test_step(*args, **kwargs)  # type: ignore[attr-defined, no-any-return]

    def predict_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Rollouts as output."""
        with self.precision_plugin.predict_step_context():  # type: ignore[attr-defined]
            return self.lightning_module.predict_step(*args, **kwargs)  # type: ignore[attr-defined, no-any-return]


class RLDDPStrategy(RLStrategyMixin, DDPStrategy):
    """A full copy of the policy on every rank: ``--trainer.strategy rl_ddp``. Arguments as of ``DDPStrategy``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object | None = None
    ) -> None:
        """Written by rank 0; if that fails, every rank raises instead of waiting for it."""
        with raise_on_all_ranks():
            super().save_checkpoint(checkpoint, filepath, storage_options)


StrategyRegistry.register("rl_ddp", RLDDPStrategy, description="DDP for steps with many forwards")
