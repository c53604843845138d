"""Data parallelism for RL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rllava_pl.checkpoint.atomic import raise_on_all_ranks


def _on_module(step: str, context: str) -> Callable[..., STEP_OUTPUT]:
    def call(strategy: Strategy, *args: object, **kwargs: object) -> STEP_OUTPUT:
        with getattr(strategy.precision_plugin, context)():
            return cast(STEP_OUTPUT, getattr(strategy.lightning_module, step)(*args, **kwargs))

    return call


class RLStrategyMixin:
    """Calls the steps on the module itself instead of inside the wrapper's forward.

    Stock strategies run ``training_step`` as one forward of DDP, FSDP or DeepSpeed. Here a step is a whole pass of the
    RL loop with many forwards, each of which must go through the wrapper (``trainer.strategy.model``).
    """

    training_step = _on_module("training_step", "train_step_context")
    validation_step = _on_module("validation_step", "val_step_context")
    test_step = _on_module("test_step", "test_step_context")
    predict_step = _on_module("predict_step", "predict_step_context")


class RLDDPStrategy(RLStrategyMixin, DDPStrategy):
    """A full copy of the policy on every rank: ``--trainer.strategy rl_ddp``. Arguments as of ``DDPStrategy``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object | None = None
    ) -> None:
        """Written by rank 0; if that fails, every rank raises instead of waiting for it."""
        with raise_on_all_ranks():
            super().save_checkpoint(checkpoint, filepath, storage_options)


StrategyRegistry.register("rl_ddp", RLDDPStrategy, description="DDP for steps with many forwards")
