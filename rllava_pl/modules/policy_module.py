"""What every training method on a policy needs: engine, updater, evaluator, metrics, checkpoints."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.batch_progress import restart_interrupted
from rllava_pl.checkpoint.io import AtomicCheckpointIO
from rllava_pl.distributed import signals
from rllava_pl.distributed.collectives import world_size
from rllava_pl.functional.schedules import lr_factor
from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.loop.batch import split_minibatches
from rllava_pl.loop.checks import check_resume, check_run_options
from rllava_pl.loop.evaluation import GREEDY, Evaluator
from rllava_pl.loop.health import HealthCheck
from rllava_pl.loop.interruption import ExitHandler, Interruption
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import (
    RENAMED,
    Batching,
    Evaluation,
    Schedule,
    complete,
    plain_options,
    signature_of,
)
from rllava_pl.loop.phases import Phases
from rllava_pl.loop.requests import make_requests
from rllava_pl.loop.state import RunState
from rllava_pl.loop.updater import Updater
from rllava_pl.models.trainable import frozen_names
from rllava_pl.models.vlm import VLM
from rllava_pl.redaction import is_secret, redact
from rllava_pl.rewards import BaseReward, RewardRunner, Scoring
from rllava_pl.rollout.callbacks import RolloutCallback, TransformersRollout
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.strategies.adapter import adapter_for
from rllava_pl.types import (
    PolicyBatch,
    PolicyOutput,
    Prompt,
    PromptBatch,
    Request,
    Reward,
    RolloutBatch,
    Sampling,
    Term,
    TrainingBatch,
)

STATE = "rllava_pl"
"""Key of the run's state in a checkpoint."""


class PolicyModule(LightningModule):
    """A policy that is trained by mini-batches of responses; the base of supervised methods and of ``RLModule``.

    Subclasses define ``training_step``, and the terms of their loss in ``terms`` and ``losses``.

    Args:
        policy: The model to train.
        rewards: Score the completions; the reward is the sum of weight x value.
        scoring: Where rewards run, their limits, and what happens to samples without a score.
        sampling: Response budget and temperature.
        max_rollouts: Passes of the loop in the run; the learning-rate schedule ends with it. 0: until the Trainer
            stops.
        batching: Optimizer steps a batch, and size of micro-batches.
        optimizer: Over the trainable parameters.
        schedule: Learning rate over the optimizer steps.
        max_grad_norm: Gradients are scaled down to this global L2 norm; ``.inf``: not clipped.
        max_skipped: Updates in a row that may be skipped because a number is not finite, before the run stops.
        evaluation: What validation and test sample.
        seed: Of sampling and of the order of mini-batches; the CLI links it to ``seed_everything``.
    """

    needs_rewards: ClassVar[bool] = True
    """False for methods that train on given responses alone."""
    needs_reference: bool = False
    """True where a term of the loss or of the reward reads the reference policy."""
    needs_values: ClassVar[bool] = False
    """True for algorithms with a critic, whose forward gives values."""
    rows_together: ClassVar[int] = 1
    """Consecutive rows of a group that stay in one micro-batch, such as a preference pair."""
    extra_rows: ClassVar[int] = 0
    """Rows of a group beside its ``group_size`` completions, such as a greedy answer or a demonstration."""
    group_size: int = 1
    reference: VLM | None
    engine: ManagedEngine

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Show all options in the signature, those of the bases included."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    def __init__(
        self,
        policy: VLM,
        rewards: list[BaseReward | Reward],
        *,
        scoring: Scoring = Scoring(),
        sampling: Sampling = Sampling(),
        max_rollouts: int = 0,
        batching: Batching = Batching(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Schedule(),
        max_grad_norm: float = 1.0,
        max_skipped: int = 5,
        evaluation: Evaluation = Evaluation(),
        seed: int = 0,
        **unknown: object,
    ) -> None:
        for name in unknown:
            renamed = f"is now {RENAMED[name]}" if name in RENAMED else "does not exist"
            raise TypeError(f"{type(self).__name__}: option {name} {renamed}")
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.rewards, self.scoring = rewards, scoring
        self.sampling = sampling
        self.max_rollouts = max_rollouts
        self.batching = complete(type(self), "batching", batching)
        self.optimizer, self.seed = optimizer, seed
        self.schedule = complete(type(self), "schedule", schedule)
        self.max_grad_norm, self.max_skipped = max_grad_norm, max_skipped
        self.evaluation = complete(type(self), "evaluation", evaluation)
        check_run_options(max_rollouts, self.batching, self.schedule, sampling, max_grad_norm, max_skipped)
        if not rewards and self.needs_rewards:
            raise ValueError(f"{type(self).__name__}: no reward given, e.g. rewards: [AnswerTagReward]")
        secrets = filter(is_secret, inspect.signature(type(self)).parameters)
        self.save_hyperparameters(ignore=["policy", "rewards", "optimizer", "unknown", *secrets])
        self.save_hyperparameters(redact(plain_options(type(self), self.hparams)))
        self.reference = None
        self.state = RunState()
        self.metrics = MetricAccumulator()
        self.health = HealthCheck()
        self.phases = Phases(Interruption(self.state, [self.metrics]))
        self.reward_runner = RewardRunner(rewards, scoring)
        self.evaluator = Evaluator(sampling, self.reward_runner, self.requests)
        self.updater = Updater(
            self.batching,
            max_grad_norm=max_grad_norm,
            max_skipped=max_skipped,
            max_tokens=sampling.max_tokens,
            state=self.state,
            metrics=self.metrics,
            rows_together=self.rows_together,
            between_micro_batches=self.phases.interruption.between_micro_batches,
        )

    # -- the life of a run -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the checkpoint available, once a machine."""
        self.policy.prepare(self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """The end of interrupted runs; the embedded engine, unless the Trainer has a rollout callback."""
        present = any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [ExitHandler(), *([] if present else [TransformersRollout()])]

    def setup(self, stage: str) -> None:
        """Refuse what would train wrongly; make checkpoints atomic; start the processes of the rewards."""
        adapter_for(self.trainer.strategy).check()
        if self.trainer.precision == "16-mixed":
            raise ValueError("precision 16-mixed scales gradients, which would be clipped scaled; use bf16-mixed")
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "predict":
            self.reward_runner.start()

    def teardown(self, stage: str) -> None:
        """End the processes of the rewards."""
        self.reward_runner.close()

    def configure_model(self) -> None:
        """Load the policy and, if anything needs one, the reference; called again for every stage."""
        if self.policy.loaded:
            return
        self.policy.prepare(self.seed)
        unloaded = copy.deepcopy(self.policy)
        self.load_policy(self.policy)
        if self.needs_reference and self.policy.lora is None:
            self.reference = self.load_policy(unloaded, trainable=False)

    def load_policy(self, policy: VLM, *, trainable: bool = True) -> VLM:
        """Load an empty policy in place; without values on a rank that receives them from another one."""
        mode = "full" if self._trainer is None else adapter_for(self.trainer.strategy).load_mode
        with torch.random.fork_rng(devices=[]):  # fresh adapters are a function of the seed, and disturb nothing else
            torch.manual_seed(seed_from(self.seed, "adapters"))
            policy.load(temperature=self.sampling.temperature, trainable=trainable, mode=mode)
        policy.needs_dummy_image = world_size() > 1 and hasattr(policy.processor, "image_processor")
        return policy

    def on_fit_start(self) -> None:
        """Give the parts the strategy, the engine and the optimizer of this run."""
        self.connect()
        scheduler = cast(LambdaLR, self.lr_schedulers())
        self.updater.connect_optimizer(cast(LightningOptimizer, self.optimizers()), scheduler)

    def connect(self) -> None:
        """Give the parts the strategy and the engine of this run."""
        self.updater.connect(adapter_for(self.trainer.strategy), Path(self.trainer.default_root_dir))
        self.evaluator.connect(self.engine)

    def on_train_start(self) -> None:
        """Note signals from now on, in place of Lightning's handlers, which act in the middle of a step."""
        signals.install_handlers()

    def on_validation_start(self) -> None:
        """Validation may also run alone."""
        self.connect()
        self.on_train_start()

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Skip what is left of an epoch once ``max_rollouts`` passes are done, also right after a resume."""
        if 0 < self.max_rollouts <= self.state.rollouts:
            self.trainer.should_stop = True
            return -1
        return None

    def on_train_batch_end(self, outputs: object, batch: PromptBatch, batch_idx: int) -> None:
        """Stop after ``max_rollouts`` passes."""
        if 0 < self.max_rollouts <= self.state.rollouts:
            self.trainer.should_stop = True

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes; frozen weights and the reference come from the policy's own checkpoint again."""
        if checkpoint["state_dict"]:  # else the strategy saves weights in its own way
            frozen = frozen_names(self)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[manifest.FACTS] = self.state.facts(dict(self.hparams))
        checkpoint[STATE] = {"state": self.state.as_dict()}
        restart_interrupted(checkpoint["loops"]["fit_loop"], self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in the frozen weights, so that loading stays strict about everything else.

        Raises:
            ValueError: The run has another seed, or ranks have read different checkpoints.
        """
        self.state.load(checkpoint.get(STATE, {}).get("state", {}))
        check_resume(checkpoint, self.seed, self.state)
        self.configure_model()
        if checkpoint["state_dict"]:  # else the strategy has loaded them
            present = self.state_dict()
            checkpoint["state_dict"] |= {name: present[name] for name in frozen_names(self)}

    # -- sampling and evaluation -------------------------------------------------------------------------------------

    def requests(self, prompts: Iterable[Prompt], *, samples: int, stream: str) -> list[Request]:
        """What to ask of the engine; a sample's seed is a function of run, stream, rollout, prompt and its number."""
        return make_requests(self.policy, list(prompts), samples, stream, self.seed, self.state.rollouts)

    def on_validation_epoch_start(self) -> None:
        """Begin with empty scores."""
        self.evaluator.start(self.device)

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Answer one batch and score the answers."""
        with self.phases("validate"):
            self.evaluator.step(list(prompts), samples=self.evaluation.samples, stream="val")

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``, ``val/reward``, ... and ``val/..._sampled``."""
        self.log_dict(self.evaluator.results("val"), sync_dist=True)  # without it Lightning warns

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Answer one batch and score the answers."""
        with self.phases("validate"):
            self.evaluator.step(list(prompts), samples=self.evaluation.samples, stream="test")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, ``test/reward``, ..."""
        self.log_dict(self.evaluator.results("test"), sync_dist=True)

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> RolloutBatch:
        """The most likely answer of every prompt; no answer is needed to compare with."""
        return RolloutBatch(self.evaluator.answer(list(prompts), samples=GREEDY, stream="predict"))

    # -- updates -----------------------------------------------------------------------------------------------------

    def forward(self, batch: PolicyBatch, reference: bool = False, entropy: bool = True) -> PolicyOutput:
        """Log-probs and entropies of the response tokens, of the policy or its reference.

        All of it goes through ``trainer.strategy.model``, which gathers what is sharded.
        """
        if not reference:
            return self.policy(batch, entropy=entropy)
        if self.reference is not None:
            return self.reference(batch, entropy=entropy)
        with self.policy.adapters_off():
            return self.policy(batch, entropy=entropy)

    def minibatches(self, batch: TrainingBatch) -> Iterator[TrainingBatch]:
        """Mini-batches of whole groups, in an order that depends on seed, rollout and epoch alone."""
        for epoch in range(self.batching.update_epochs):
            order = permutation(seed_from(self.seed, "minibatches", self.state.rollouts, epoch), len(batch.inputs))
            yield from split_minibatches(batch, self.batching.num_minibatches, list(order))

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """The named terms of the loss: mask, aggregation and weight of each, a function of the batch's rows."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(self, batch)")

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Loss of every token (N, T) for each of the terms, before aggregation."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(self, output, batch)")

    def parameter_groups(self) -> list[tuple[list[torch.nn.Parameter], float]]:
        """What is trained, each group with the factor of its learning rate."""
        return [([p for p in self.policy.parameters() if p.requires_grad], 1.0)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, its learning rate scheduled by optimizer steps."""
        groups = self.parameter_groups()
        optimizer = self.optimizer([{"params": parameters} for parameters, _ in groups])
        if self._trainer is not None:  # outside of a run there is no strategy that could fail
            adapter_for(self.trainer.strategy).check_optimizer(optimizer)
        for group, (_, multiple) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] *= multiple

        factor = partial(
            lr_factor,
            schedule=self.schedule.kind,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.max_rollouts * self.batching.updates_per_rollout,
            final_ratio=self.schedule.final_ratio,
        )
        return [optimizer], [LambdaLR(optimizer, factor)]
