"""A module's life in a Trainer: loading the policy, choosing an engine, checkpoints, the end of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback

from rllava_pl.functional.seeds import seed_from
from rllava_pl.modules.loop.options import Options
from rllava_pl.rollout.lifecycle import RolloutCallback, TransformersRollout
from rllava_pl.strategies import updates
from rllava_pl.strategies.collectives import rank
from rllava_pl.types import Prompt, PromptBatch, Request

Checkpoint = dict[str, Any]


class Lifecycle(Options):
    """Lightning's hooks around the loop of ``RLModule``."""

    def prepare_data(self) -> None:
        """Make the checkpoint available, once a machine."""
        self.source.prepare(self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """The embedded engine, unless the Trainer has a rollout callback."""
        given = any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if given else [TransformersRollout()]

    def setup(self, stage: str) -> None:
        """Refuse what would train wrongly."""
        updates.check(self.trainer.strategy)
        if self.trainer.precision == "16-mixed":
            raise ValueError("precision 16-mixed scales gradients, which would be clipped scaled; use bf16-mixed")

    def configure_model(self) -> None:
        """Load policy and, if a KL term needs one, the reference; called again for every stage."""
        if hasattr(self, "policy"):
            return
        self.source.prepare(self.seed)
        with torch.random.fork_rng(devices=[]):  # fresh adapters are a function of the seed, and disturb nothing else
            torch.manual_seed(seed_from(self.seed, "adapters"))
            self.policy = self.source.load(temperature=self.sampling.temperature)
        if self.needs_reference and self.source.lora is None:
            self.reference = self.source.load(temperature=self.sampling.temperature, trainable=False)

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Skip what is left of an epoch once ``max_rollouts`` passes are done, also right after a resume."""
        if self._finished():
            self.trainer.should_stop = True
            return -1
        return None

    def on_train_batch_end(self, outputs: object, batch: PromptBatch, batch_idx: int) -> None:
        """Stop after ``max_rollouts`` passes."""
        if self._finished():
            self.trainer.should_stop = True

    def _finished(self) -> bool:
        return 0 < self.max_rollouts <= self.rollout_index

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep what training changes; frozen weights and the reference come from the policy's own checkpoint again."""
        frozen = self._frozen_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["kl_factor"] = self.kl_controller.coef
        checkpoint["collection"] = self.collection.state() if self.collection.max_refills else []

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Fill in the frozen weights, so that loading stays strict about everything else."""
        seed = checkpoint.get("hyper_parameters", {}).get("seed", self.seed)
        if seed != self.seed:
            raise ValueError(
                f"the checkpoint was made with seed {seed}, this run has seed {self.seed}: it would go on with other "
                "samples in another order; pass the same seed (--seed_everything)"
            )
        self.configure_model()
        present = self.state_dict()
        checkpoint["state_dict"] |= {name: present[name] for name in self._frozen_names()}
        self.kl_controller.coef = checkpoint.get("kl_factor", 1.0)
        self.collection.restore(checkpoint.get("collection", []), rank())

    def _frozen_names(self) -> set[str]:
        kept = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept |= {"rollouts_done", "updates_done"}
        return set(self.state_dict()) - kept

    def publish(self, metrics: dict[str, float]) -> None:
        """Hand the metrics of a rollout to loggers and callbacks, the way Lightning's own monitors do.

        ``self.log`` would drop all but every ``log_every_n_steps``-th rollout (50 by default) and costs 0.2 ms a name.
        """
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.rollout_index)
        values = {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(values)
        self.trainer.logged_metrics.update(values)

    def requests(self, prompts: Sequence[Prompt], *, samples: int, stream: str) -> list[Request]:
        """What to ask of the engine; a sample's seed is a function of run, stream, rollout, prompt and its number."""
        seen: Counter[str] = Counter()
        rollout, round_, requests = self.rollout_index, self.collection.rounds, []
        stream = f"{stream}/{round_}" if round_ else stream
        for p, (prompt, inputs) in enumerate(zip(prompts, self.policy.encode(prompts), strict=True)):
            first = seen[prompt.uid] * samples  # the same row twice in a batch must not give the same samples twice
            counters = range(first, first + samples)
            seeds = tuple(seed_from(self.seed, stream, rollout, prompt.uid, g) for g in counters)
            requests.append(Request(prompt, inputs, group=(rank() << 32) + (round_ << 20) + p, seeds=seeds))
            seen[prompt.uid] += 1
        return requests
