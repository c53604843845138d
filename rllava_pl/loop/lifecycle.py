"""A module's life in a Trainer: loading the policy, choosing an engine, checkpoints, the end of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback

from rllava_pl.checkpoint.io import AtomicCheckpointIO
from rllava_pl.distributed.collectives import rank, world_size
from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.checkpointing import Checkpointing
from rllava_pl.loop.interruption import LastWords
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.callbacks import RolloutCallback, TransformersRollout
from rllava_pl.strategies import adapter as updates
from rllava_pl.types import Prompt, PromptBatch, Request


class Lifecycle(Checkpointing):
    """Lightning's hooks around the loop of ``RLModule``."""

    def prepare_data(self) -> None:
        """Make the checkpoint available, once a machine."""
        self.source.prepare(self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """An end for interrupted runs; the embedded engine, unless the Trainer has a rollout callback."""
        given = any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [LastWords(), *([] if given else [TransformersRollout()])]

    def setup(self, stage: str) -> None:
        """Refuse what would train wrongly; make checkpoints atomic; start the processes of the rewards."""
        updates.check(self.trainer.strategy)
        if self.trainer.precision == "16-mixed":
            raise ValueError("precision 16-mixed scales gradients, which would be clipped scaled; use bf16-mixed")
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "predict":
            self.open_panel()

    def teardown(self, stage: str) -> None:
        """End the processes of the rewards."""
        self.close_panel()

    def configure_model(self) -> None:
        """Load policy and, if a KL term needs one, the reference; called again for every stage."""
        if hasattr(self, "policy"):
            return
        self.source.prepare(self.seed)
        with torch.random.fork_rng(devices=[]):  # fresh adapters are a function of the seed, and disturb nothing else
            torch.manual_seed(seed_from(self.seed, "adapters"))
            self.policy = self.load_policy()
        if self.needs_reference and self.source.lora is None:
            self.reference = self.load_policy(trainable=False)

    def load_policy(self, *, trainable: bool = True) -> Policy:
        """A policy of the run's checkpoint; without values on a rank that gets them from another one."""
        how = "whole" if self._trainer is None else updates.loading(self.trainer.strategy)
        policy = self.source.load(
            temperature=self.sampling.temperature, trainable=trainable, empty=how == "empty", may_wait=how == "waiting"
        )
        policy.always_sees = world_size() > 1 and hasattr(policy.processor, "image_processor")
        return policy

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
