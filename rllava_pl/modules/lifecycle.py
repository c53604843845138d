"""A module's life in a Trainer: loading the policy, choosing an engine, checkpoints, the end of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule

from rllava_pl.functional.seeds import seed_from
from rllava_pl.rollout.lifecycle import RolloutCallback, TransformersRollout
from rllava_pl.strategies import updates
from rllava_pl.types import PromptBatch

if TYPE_CHECKING:
    from rllava_pl.modules.base import RLModule

Checkpoint = dict[str, dict[str, torch.Tensor]]


class Lifecycle(LightningModule):
    """Lightning's hooks around the loop; part of ``RLModule``, which holds the options."""

    def prepare_data(self: RLModule) -> None:
        """Make the checkpoint available, once a machine."""
        self.source.prepare(self.seed)

    def configure_callbacks(self: RLModule) -> list[Callback]:
        """The embedded engine, unless the Trainer has a rollout callback."""
        given = any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks)
        return [] if given else [TransformersRollout()]

    def setup(self: RLModule, stage: str) -> None:
        """Refuse strategies that would train wrongly."""
        updates.check(self.trainer.strategy)

    def configure_model(self: RLModule) -> None:
        """Load policy and, if a KL term needs one, the reference; called again for every stage."""
        if self.policy is not None:
            return
        self.source.prepare(self.seed)
        with torch.random.fork_rng(devices=[]):  # fresh adapters are a function of the seed, and disturb nothing else
            torch.manual_seed(seed_from(self.seed, "adapters"))
            self.policy = self.source.load(temperature=self.sampling.temperature)
        if self.needs_reference and self.source.lora is None:
            self.reference = self.source.load(temperature=self.sampling.temperature, trainable=False)

    def on_train_batch_start(self: RLModule, batch: PromptBatch, batch_idx: int) -> int | None:
        """Skip what is left of an epoch once ``max_rollouts`` passes are done, also right after a resume."""
        if self._finished():
            self.trainer.should_stop = True
            return -1
        return None

    def on_train_batch_end(self: RLModule, outputs: None, batch: PromptBatch, batch_idx: int) -> None:
        """Stop after ``max_rollouts`` passes."""
        if self._finished():
            self.trainer.should_stop = True

    def _finished(self: RLModule) -> bool:
        return 0 < self.max_rollouts <= self.rollout_index

    def on_save_checkpoint(self: RLModule, checkpoint: Checkpoint) -> None:
        """Keep what training changes; frozen weights and the reference come from the policy's own checkpoint again."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in self._frozen_names()}

    def on_load_checkpoint(self: RLModule, checkpoint: Checkpoint) -> None:
        """Fill in the frozen weights, so that loading stays strict about everything else."""
        seed = checkpoint.get("hyper_parameters", {}).get("seed", self.seed)
        if seed != self.seed:
            raise ValueError(
                f"the checkpoint was made with seed {seed}, this run has seed {self.seed}: it would continue with other samples "
                "and another order; pass the same seed (--seed_everything)"
            )
        self.configure_model()
        present = self.state_dict()
        checkpoint["state_dict"] |= {name: present[name] for name in self._frozen_names()}

    def _frozen_names(self: RLModule) -> set[str]:
        kept = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept |= {"rollouts_done", "updates_done"}
        return set(self.state_dict()) - kept
