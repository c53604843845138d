"""What a run is told, and what it remembers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rllava_pl.functional.kl import AdaptiveKLController, FixedKLController, KLEstimator
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.functional.schedules import Schedule
from rllava_pl.loop.checks import COUNT, NOT_NEGATIVE, PART, POSITIVE, Range, check_choices, check_ranges
from rllava_pl.loop.collection import Collection
from rllava_pl.loop.diagnosis import Diagnosis
from rllava_pl.loop.tally import Tally
from rllava_pl.models.policy import Policy
from rllava_pl.models.vlm import VLM
from rllava_pl.redaction import is_secret, redacted
from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.runner import Judging
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.types import PromptBatch, Reward, Sampling

if TYPE_CHECKING:
    from rllava_pl.loop.phases import PhaseObserver

EngineCorrection = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


class Options(LightningModule):
    """Constructor of ``RLModule``, which documents the arguments: options, their contradictions, counters."""

    needs_groups: ClassVar[bool] = False
    """True for algorithms that compare the completions of a prompt with each other."""
    needs_rewards: ClassVar[bool] = True
    """False for algorithms that learn from given responses alone."""
    needs_old_logp: ClassVar[bool] = False
    """True for losses that must know log-probs before the first update of a rollout batch."""
    needs_values: ClassVar[bool] = False
    """True for algorithms with a critic, whose forward gives values."""
    extra_members: ClassVar[int] = 0
    """Rows of a group beside its ``group_size`` completions, such as a greedy answer or a demonstration."""
    demonstrations_apart: ClassVar[bool] = False
    """True where the loss of demonstration tokens has a denominator of its own (their mean)."""
    ranges: ClassVar[dict[str, Range]] = {
        "group_size": COUNT,
        "max_rollouts": NOT_NEGATIVE,
        "minibatches": COUNT,
        "epochs": COUNT,
        "micro_batch_size": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "final_lr_ratio": PART,
        "max_grad_norm": POSITIVE,  # .inf: no clipping; 0 would mean that to some and "no step" to others
        "max_skipped": COUNT,
        "clip_low": NOT_NEGATIVE,
        "clip_high": NOT_NEGATIVE,
        "dual_clip": Range(1, without_low=True),
        "kl_loss_coef": NOT_NEGATIVE,
        "kl_reward_coef": NOT_NEGATIVE,
        "kl_target": NOT_NEGATIVE,
        "kl_horizon": COUNT,
        "overlong_buffer": Range(0, 1, without_high=True),
        "overlong_scale": NOT_NEGATIVE,
        "max_refills": NOT_NEGATIVE,
        "informative_share": PART,
        "engine_correction_cap": POSITIVE,
        "val_samples": NOT_NEGATIVE,
    }
    """What numbers may be, by the options' names; an algorithm adds its own."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "lr_schedule": get_args(Schedule),
        "aggregation": get_args(ReduceMode),
        "kl_estimator": get_args(KLEstimator),
        "engine_correction": get_args(EngineCorrection),
    }
    """What words may be, likewise."""
    rollouts_done: Tensor
    updates_done: Tensor
    policy: Policy
    engine: ManagedEngine

    def __init__(
        self,
        policy: VLM,
        rewards: list[BaseReward | Reward],
        *,
        judging: Judging = Judging(),
        group_size: int = 8,
        sampling: Sampling = Sampling(),
        max_rollouts: int = 0,
        minibatches: int = 1,
        epochs: int = 1,
        micro_batch_size: int = 0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_schedule: Schedule = "constant",
        warmup_steps: int = 0,
        final_lr_ratio: float = 0.0,
        max_grad_norm: float = 1.0,
        max_skipped: int = 5,
        aggregation: ReduceMode = "token-mean",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kl_loss_coef: float = 0.0,
        kl_reward_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_target: float = 0.0,
        kl_horizon: int = 10_000,
        entropy_coef: float = 0.0,
        overlong_buffer: float = 0.0,
        overlong_scale: float = 1.0,
        mask_truncated: bool = False,
        max_refills: int = 0,
        informative_share: float = 1.0,
        informative_component: str = "accuracy",
        engine_correction: EngineCorrection = "token-truncate",
        engine_correction_cap: float = 2.0,
        val_samples: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        objects = ["policy", "rewards", "judging", "optimizer", "sampling"]
        self.save_hyperparameters(ignore=[*objects, *_secrets(type(self))])  # loggers and checkpoints keep the others
        self.save_hyperparameters(redacted(dict(self.hparams)))
        self.source = policy
        self.rewards = rewards
        self.judging = judging
        self.group_size = group_size
        self.sampling = sampling
        self.max_rollouts = max_rollouts
        self.num_minibatches = minibatches
        self.epochs = epochs
        self.micro_batch_size = micro_batch_size
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.final_lr_ratio = final_lr_ratio
        self.max_grad_norm = max_grad_norm
        self.max_skipped, self.skipped_in_a_row = max_skipped, 0
        self.aggregation = aggregation
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_loss_coef, self.kl_reward_coef = kl_loss_coef, kl_reward_coef
        self.kl_estimator = kl_estimator
        self.kl_controller = AdaptiveKLController(1.0, kl_target, kl_horizon) if kl_target else FixedKLController(1.0)
        self.entropy_coef = entropy_coef
        self.overlong_buffer, self.overlong_scale = overlong_buffer, overlong_scale
        self.mask_truncated = mask_truncated
        self.collection = Collection(max_refills, informative_share, informative_component)
        self.engine_correction, self.engine_correction_cap = engine_correction, engine_correction_cap
        self.val_samples = val_samples
        self.seed = seed
        self._check_options()
        self.reference: Policy | None = None
        self.tally = Tally()
        self.diagnosis = Diagnosis()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.observers: list[PhaseObserver] = []
        self.rollout_version = -1
        self.register_buffer("rollouts_done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates_done", torch.zeros((), dtype=torch.int64))

    @property
    def rollout_index(self) -> int:
        """Passes of the loop so far."""
        return int(self.rollouts_done)

    @property
    def weight_version(self) -> int:
        """Optimizer steps in the present weights."""
        return int(self.updates_done)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.num_minibatches * self.epochs

    @property
    def needs_reference(self) -> bool:
        """Whether any KL term is on."""
        return bool(self.kl_loss_coef or self.kl_reward_coef)

    @property
    def evaluates_old_logp(self) -> bool:
        """Whether the sampling policy's log-probs must be known before the update, whose first forward gives them."""
        adaptive = isinstance(self.kl_controller, AdaptiveKLController)
        return (
            self.needs_old_logp
            or self.needs_values
            or self.updates_per_rollout > 1
            or bool(self.kl_reward_coef)
            or adaptive
        )

    @property
    def trained_members(self) -> int:
        """Rows of a group in the update."""
        return self.group_size + self.extra_members

    @property
    def overlong_tokens(self) -> int:
        """Width of the stretch before the budget's end in which length is punished."""
        return max(1, round(self.overlong_buffer * self.sampling.max_tokens))

    def _check_options(self) -> None:
        """Refuse options that are out of range or contradict each other, with the arithmetic."""
        name, group, micro = type(self).__name__, self.group_size, self.micro_batch_size
        check_ranges(name, self.hparams, self.ranges)
        check_choices(self.hparams, self.choices)
        if not self.rewards and self.needs_rewards:
            raise ValueError(f"{name}: no reward given, so nothing to learn from; e.g. rewards: [AnswerTagReward]")
        if group < (2 if self.needs_groups else 1):
            raise ValueError(f"{name} compares the completions of a prompt: group_size must be >= 2, is {group}")
        rows = self.trained_members
        if micro and micro % rows and rows % micro:
            beside = f" (and {rows - group} beside it)" if rows > group else ""
            raise ValueError(
                f"micro_batch_size {micro} and group_size {group}{beside}: a group shares its prompt, so a micro-batch "
                f"holds whole groups (a multiple of {rows}) or equal parts of one (a divisor of {rows})"
            )
        if self.collection.max_refills and group < 2:
            raise ValueError("max_refills looks for groups whose rewards differ; group_size 1 has none")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: all completions of a prompt would be equal")
        if isinstance(self.kl_controller, AdaptiveKLController) and not self.needs_reference:
            raise ValueError("kl_target adapts the KL coefficient, but kl_loss_coef and kl_reward_coef are both 0")
        if self.lr_schedule != "constant" and self.max_rollouts < 1:
            raise ValueError(f"lr_schedule {self.lr_schedule!r} decays over max_rollouts, which is {self.max_rollouts}")
        steps = self.max_rollouts * self.updates_per_rollout
        if self.lr_schedule != "constant" and steps <= self.warmup_steps:
            raise ValueError(
                f"lr_schedule {self.lr_schedule!r} decays after warmup_steps={self.warmup_steps}, but the run has "
                f"max_rollouts {self.max_rollouts} x minibatches {self.num_minibatches} x epochs {self.epochs} "
                f"= {steps} steps; lower warmup_steps, raise max_rollouts or set lr_schedule: constant"
            )

    def _check_batch(self, prompts: PromptBatch) -> None:
        if len(prompts) % self.num_minibatches or not len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts x group_size {self.group_size} = {len(prompts) * self.group_size} samples "
                f"cannot be split into {self.num_minibatches} mini-batches of whole groups; make the data's batch_size "
                "a multiple of it"
            )


def _secrets(cls: type) -> list[str]:
    """Options of a user's algorithm that hold a secret, by their names."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    return [name for init in constructors for name in inspect.signature(init).parameters if is_secret(name)]
