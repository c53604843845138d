"""Option groups of the algorithms: frozen dataclasses that check themselves.

What a user leaves out keeps the algorithm's own default, in Python, in YAML and on the command line alike:
``GSPO(clip=Clip(high=5e-4))`` keeps GSPO's ``low``. So a group remembers which fields were set (``with_defaults``).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, Self, TypedDict, TypeVar, cast, get_args

from rllava_pl.functional._numerics import check_choice
from rllava_pl.functional.kl import KLEstimator

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptionGroup:
    """Base of the groups: knows which fields were set, and completes the others from another group."""

    fields_set: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Remember the names of the arguments."""
        group = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        object.__setattr__(group, "fields_set", frozenset([*names[: len(args)], *kwargs]))
        return group

    def with_defaults(self, defaults: Self) -> Self:
        """The fields that were set, and those of ``defaults`` for the rest."""
        return dataclasses.replace(defaults, **{name: getattr(self, name) for name in self.fields_set})


def require(ok: bool, option: str, value: object, rule: str) -> None:
    """Refuse a value of an option.

    Raises:
        ValueError: ``clip.dual is 1.0; it must be larger than 1, or null``.
    """
    if not ok:
        raise ValueError(f"{option} is {value!r}; it must be {rule}")


def require_range(owner: object, *options: str, low: float = 0.0, high: float = math.inf, path: str = "") -> None:
    """Refuse attributes of ``owner`` that are not between ``low`` and ``high``; ``path`` stands before their names.

    Raises:
        ValueError: ``kl.loss_coef is -1.0; it must be at least 0``.
    """
    rule = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    for option in options:
        value = getattr(owner, option)
        require(low <= value <= high, f"{path}{option}", value, rule)


@dataclass(frozen=True)
class KL(OptionGroup):
    """KL divergence to the reference policy, as a term of the loss or as a penalty on the reward.

    Args:
        loss_coef: Weight in the loss; 0 for both coefficients loads no reference.
        reward_coef: Weight of k1, summed over the response, subtracted from the reward.
        estimator: Form of the term in the loss.
        target: Divergence (token mean of k1) that an adaptive coefficient holds; 0: fixed coefficients.
        horizon: Samples over which an adapted coefficient changes by at most a fifth.
    """

    loss_coef: float = 0.0
    reward_coef: float = 0.0
    estimator: KLEstimator = "k3"
    target: float = 0.0
    horizon: int = 10_000

    def __post_init__(self) -> None:
        require_range(self, "loss_coef", "reward_coef", "target", path="kl.")
        require_range(self, "horizon", low=1, path="kl.")
        check_choice("kl.estimator", self.estimator, get_args(KLEstimator))


class ClipRange(TypedDict):
    """Arguments of most losses."""

    clip_low: float
    clip_high: float


@dataclass(frozen=True)
class Clip(OptionGroup):
    """Clip range of the importance ratio.

    Args:
        low: Ratios below 1 - low are clipped.
        high: Ratios above 1 + high are clipped.
        dual: Bound on the ratio of tokens with negative advantage (arXiv 1912.09729), above 1; null: no bound.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        require_range(self, "low", "high", path="clip.")
        require(self.dual is None or self.dual > 1, "clip.dual", self.dual, "larger than 1, or null")

    @property
    def range(self) -> ClipRange:
        """The arguments ``clip_low`` and ``clip_high`` of most losses."""
        return {"clip_low": self.low, "clip_high": self.high}


@dataclass(frozen=True)
class Batching(OptionGroup):
    """How a rollout batch becomes optimizer steps, and an optimizer step becomes forward and backward passes.

    Args:
        num_minibatches: Optimizer steps that one pass over a rollout batch is split into.
        update_epochs: Passes over each rollout batch.
        micro_batch_size: Most completions in one forward and backward; 0: no limit. It never changes the gradient.
        micro_batch_tokens: Most tokens in one forward and backward, prompts counted once a group; 0: no limit.
    """

    num_minibatches: int = 1
    update_epochs: int = 1
    micro_batch_size: int = 0
    micro_batch_tokens: int = 0

    def __post_init__(self) -> None:
        require_range(self, "num_minibatches", "update_epochs", low=1, path="batching.")
        require_range(self, "micro_batch_size", "micro_batch_tokens", path="batching.")

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.num_minibatches * self.update_epochs


@dataclass(frozen=True)
class Schedule(OptionGroup):
    """Learning-rate schedule over the optimizer steps of the run.

    Args:
        kind: After the warm-up: constant, or a decay that ends with ``max_rollouts``.
        warmup_steps: Optimizer steps in which the learning rate rises linearly to its peak.
        final_ratio: Where linear and cosine schedules end, as a fraction of the peak.
    """

    kind: ScheduleKind = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_choice("schedule.kind", self.kind, get_args(ScheduleKind))
        require_range(self, "warmup_steps", path="schedule.")
        require_range(self, "final_ratio", high=1, path="schedule.")


@dataclass(frozen=True)
class LengthPenalty(OptionGroup):
    """Soft penalty on responses that come close to the token budget (DAPO, arXiv 2503.14476).

    Args:
        buffer_tokens: Tokens before the end of the budget over which the penalty grows linearly; 0: no penalty; null:
            20 % of the budget, as in the paper.
        scale: Penalty at the end of the budget.
    """

    buffer_tokens: int | None = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        buffer = self.buffer_tokens
        require(buffer is None or buffer >= 0, "length_penalty.buffer_tokens", buffer, "at least 0, or null")
        require_range(self, "scale", path="length_penalty.")

    def resolve_buffer_tokens(self, max_tokens: int) -> int:
        """Width of the buffer for a budget of ``max_tokens``."""
        return max(1, round(0.2 * max_tokens)) if self.buffer_tokens is None else self.buffer_tokens


@dataclass(frozen=True)
class DynamicSampling(OptionGroup):
    """Replace groups whose samples all scored the same by further rounds of generation (DAPO, arXiv 2503.14476).

    Args:
        max_rounds: Further rounds, with the prompts of the next data batches, before the batch is trained as it is;
            0: every batch is trained as it is.
        min_informative: Fraction of a batch that must be informative groups for it to be full.
        component: Component of the rewards that decides whether a group is informative.
    """

    max_rounds: int = 0
    min_informative: float = 1.0
    component: str = "accuracy"

    def __post_init__(self) -> None:
        require_range(self, "max_rounds", path="dynamic_sampling.")
        least = self.min_informative
        require(0 < least <= 1, "dynamic_sampling.min_informative", least, "above 0 and at most 1")


@dataclass(frozen=True)
class EngineCorrection(OptionGroup):
    """Importance weights for the difference between the engine's and the trainer's probabilities.

    Not used where the engine computes with the trainer's own weights and arithmetic.

    Args:
        level: One weight a token or a sequence; none: no correction.
        mode: Weights above the cap are truncated to it, or their tokens masked out.
        cap: Largest weight.
    """

    level: Literal["none", "token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: float = 2.0

    def __post_init__(self) -> None:
        check_choice("engine_correction.level", self.level, ("none", "token", "sequence"))
        check_choice("engine_correction.mode", self.mode, ("truncate", "mask"))
        require(self.cap > 0, "engine_correction.cap", self.cap, "larger than 0")


@dataclass(frozen=True)
class Masking(OptionGroup):
    """Rows that are left out of the losses; they stay in baselines, penalties and statistics.

    Args:
        truncated: Leave out responses that the token budget cut off (DAPO, arXiv 2503.14476).
    """

    truncated: bool = False


@dataclass(frozen=True)
class Evaluation(OptionGroup):
    """What validation and test sample.

    Args:
        samples: Completions of each prompt, at the training temperature, beside the greedy one; 0: greedy only.
    """

    samples: int = 0

    def __post_init__(self) -> None:
        require_range(self, "samples", path="evaluation.")


GroupT = TypeVar("GroupT", bound=OptionGroup)


def complete(cls: type, name: str, group: GroupT) -> GroupT:
    """``group`` with the defaults that class ``cls`` declares for its option ``name``, for all fields not set."""
    for base in cls.__mro__:
        parameter = inspect.signature(vars(base)["__init__"]).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is not None and isinstance(parameter.default, OptionGroup):
            return group.with_defaults(cast(GroupT, parameter.default))
    return group


def plain_options(cls: type, options: Mapping[str, object]) -> dict[str, object]:
    """Hyper-parameters as plain data, groups completed with the defaults of the algorithm."""
    completed = {k: complete(cls, k, v) if isinstance(v, OptionGroup) else v for k, v in options.items()}
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        for name, value in completed.items()
    }


def signature_of(cls: type) -> inspect.Signature:
    """All options of an algorithm: those that it names, then those of its bases that its ``**kwargs`` passes on."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    ordered = sorted(parameters.values(), key=lambda p: (p.kind, p.default is not p.empty))
    return inspect.Signature(ordered)


RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "judging": "scoring",
        "minibatches": "batching.num_minibatches",
        "epochs": "batching.update_epochs",
        "micro_batch_size": "batching.micro_batch_size",
        "lr_schedule": "schedule.kind",
        "warmup_steps": "schedule.warmup_steps",
        "final_lr_ratio": "schedule.final_ratio",
        "clip_low": "clip.low",
        "clip_high": "clip.high",
        "dual_clip": "clip.dual",
        "kl_loss_coef": "kl.loss_coef",
        "kl_reward_coef": "kl.reward_coef",
        "kl_estimator": "kl.estimator",
        "kl_target": "kl.target",
        "kl_horizon": "kl.horizon",
        "overlong_buffer": "length_penalty.buffer_tokens, which counts tokens",
        "overlong_scale": "length_penalty.scale",
        "mask_truncated": "masking.truncated",
        "max_refills": "dynamic_sampling.max_rounds",
        "informative_share": "dynamic_sampling.min_informative",
        "informative_component": "dynamic_sampling.component",
        "engine_correction_cap": "engine_correction.cap",
        "val_samples": "evaluation.samples",
    }
)
"""Options of release 0.1 and what they are called now."""
