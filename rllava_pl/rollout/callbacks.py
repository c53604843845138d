"""Callbacks that give a module its engine for the time of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.rollout.common import BatchEngine
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.sync_check import FULL_PRECISION, HALF_PRECISION, GapLimit, SyncCheck
from rllava_pl.strategies.adapter import adapter_for
from rllava_pl.types import RolloutEngine

if TYPE_CHECKING:
    from rllava_pl.models.policy import Policy
    from rllava_pl.models.vlm import VLM


class Counters(Protocol):
    """What a module counts."""

    updates: int


class SamplingModule(Protocol):
    """What a callback needs of a module: its policy, the number of its updates, its clock, a place for the engine."""

    trainer: Trainer
    policy: VLM
    state: Counters
    seed: int
    engine: ManagedEngine | None

    def phases(self, name: str) -> AbstractContextManager[object]:
        """Context around a phase of the run."""


class RolloutCallback(Callback, ABC):
    """Builds an engine for the module, keeps its weights those of the policy, and closes it.

    Derive from it and define ``build`` to sample with an engine that the package does not have.
    """

    retries = 2
    """Further attempts at a call that failed, before the run stops."""

    @abstractmethod
    def build(self, module: SamplingModule) -> RolloutEngine:
        """The engine for this module's policy; called at the first rollout."""

    def after_sync(self, managed: ManagedEngine) -> None:
        """Called whenever the engine has taken over new weights, before it samples; does nothing by default."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set ``module.engine``; the process group exists, the policy may not be loaded yet."""
        module = cast(SamplingModule, pl_module)
        module.engine = ManagedEngine(
            build=lambda: self.build(module),
            policy=module.policy,
            weights=lambda: adapter_for(trainer.strategy).full_weights(module.policy.model),
            version=lambda: module.state.updates,
            after_sync=self.after_sync,
            phase=module.phases,
            retries=self.retries,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the engine."""
        module = cast(SamplingModule, pl_module)
        if module.engine is not None:
            module.engine.close()


class TransformersRollout(RolloutCallback):
    """Rollouts from the trained weights themselves, with nothing to install or synchronise; the default.

    Args:
        batch_prompts: Prompts sampled at a time; bounds the memory of the cache.
    """

    retries = 0  # a call that fails in this process would fail again

    def __init__(self, batch_prompts: int = 64) -> None:
        self.batch_prompts = batch_prompts

    def build(self, module: SamplingModule) -> RolloutEngine:
        """The embedded engine on the module's policy."""
        from rllava_pl.rollout.transformers import TransformersEngine

        adapter = adapter_for(module.trainer.strategy)
        return TransformersEngine(
            module.policy, batch_prompts=self.batch_prompts, unsharded=adapter.unsharded, lockstep=adapter.lockstep
        )


class SyncCheckedRollout(RolloutCallback):
    """A rollout callback that compares engine and trainer after syncs; base of those whose engine has a copy.

    Args:
        every: Syncs from one comparison to the next; 0: never.
        limit: Largest difference of a log-prob that passes, in nats; 0: by the dtype.
        recover: At a larger one, push all weights again and leave a risky memory mode before giving up.
    """

    def __init__(self, every: int, limit: float, recover: bool = False) -> None:
        if every < 0 or limit < 0:
            raise ValueError(f"sync_check_every ({every}) and sync_check_limit ({limit}) must not be negative")
        self.sync_check_every = every
        self.sync_check_limit = limit
        self.sync_check_recover = recover
        self._precision = "32-true"
        self._sync_check: SyncCheck | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As of every rollout callback; the comparisons are counted from here."""
        self._precision = str(trainer.precision)
        self._sync_check = None
        super().setup(trainer, pl_module, stage)

    def engine_dtype(self, policy: Policy) -> torch.dtype:
        """What the engine computes in: the same as the trainer, unless a subclass can say better."""
        half = {"bf16": torch.bfloat16, "16": torch.float16}
        return half.get(self._precision.split("-")[0], policy.model.dtype)

    def after_sync(self, managed: ManagedEngine) -> None:
        """Compare engine and trainer, if it is due."""
        if not self.sync_check_every:
            return
        if self._sync_check is None:  # the context of a server is unknown before the first sync
            engine, limit = cast(BatchEngine, managed.engine), HALF_PRECISION
            if self.sync_check_limit:
                limit = GapLimit(largest=self.sync_check_limit, mean=self.sync_check_limit)
            elif self.engine_dtype(engine.policy) == torch.float32:
                limit = FULL_PRECISION
            self._sync_check = SyncCheck(
                engine.policy,
                limit=limit,
                every=self.sync_check_every,
                context_tokens=engine.context_tokens,
                images=engine.images,
                recover=self.sync_check_recover,
            )
        self._sync_check(managed)
