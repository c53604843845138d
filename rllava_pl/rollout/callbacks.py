"""Callbacks that give a module its engine for the time of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.strategies.adapter import full_weights, in_step, parts
from rllava_pl.types import RolloutEngine

if TYPE_CHECKING:
    from rllava_pl.models.policy import Policy
    from rllava_pl.models.vlm import VLM


class Samples(Protocol):
    """What a callback needs of a module: its policy, how often it was updated, and a place for the engine."""

    trainer: Trainer
    source: VLM
    policy: Policy
    seed: int
    weight_version: int
    engine: ManagedEngine | None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context around a phase of the run."""


class RolloutCallback(Callback, ABC):
    """Owns an engine: builds it, keeps it in step with the policy, closes it. Subclasses say how to build it."""

    retries = 2
    """Times a call that failed is made again before the run stops."""

    @abstractmethod
    def build(self, module: Samples) -> RolloutEngine:
        """The engine for this module's policy."""

    def after_sync(self, managed: ManagedEngine) -> None:
        """Called whenever the engine has taken over new weights, before it samples; does nothing by default."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the engine to the module; the process group exists, the policy may not be loaded yet."""
        module = cast(Samples, pl_module)
        module.engine = ManagedEngine(
            build=lambda: self.build(module),
            weights=lambda: full_weights(trainer.strategy, module.policy.model),
            version=lambda: module.weight_version,
            after_sync=self.after_sync,
            phase=module.phase,
            retries=self.retries,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the engine."""
        module = cast(Samples, pl_module)
        if module.engine is not None:
            module.engine.close()


class TransformersRollout(RolloutCallback):
    """Rollouts from the trained weights themselves, with nothing to install or synchronise; the default.

    Args:
        batch_prompts: Prompts sampled at a time; bounds the memory of the cache.
    """

    retries = 0  # it computes in this process, with other ranks if sharded: what fails once fails again

    def __init__(self, batch_prompts: int = 64) -> None:
        self.batch_prompts = batch_prompts

    def build(self, module: Samples) -> RolloutEngine:
        """The embedded engine on the module's policy."""
        from rllava_pl.rollout.transformers import TransformersEngine

        strategy = module.trainer.strategy
        return TransformersEngine(
            module.policy,
            batch_prompts=self.batch_prompts,
            parts=lambda: parts(strategy),
            in_step=in_step(strategy),
        )
