"""What the memory of a run depends on, from the point of view of one of its processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rllava_pl.memory.placement import Placement
from rllava_pl.models.trainable import LoRA

if TYPE_CHECKING:
    from rllava_pl.models.vlm import VLM

EngineKind = Literal["embedded", "vllm", "server"]
EngineMemory = Literal["resident", "release_kv", "sleep", "discard"]


@dataclass(frozen=True)
class PlannedModel:
    """What is loaded and what of it is trained; the fields are those of ``VLM``."""

    path: str
    revision: str = "main"
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = field(default=None, hash=False)
    share_prompt: bool = True

    @classmethod
    def of(cls, vlm: VLM) -> PlannedModel:
        """The same fields of a policy."""
        values = {field.name: getattr(vlm, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {"freeze": tuple(vlm.freeze)})


@dataclass(frozen=True)
class PlannedEngine:
    """What samples the rollouts."""

    kind: EngineKind = "embedded"
    memory: EngineMemory = "resident"
    """What vLLM frees while the policy is updated; see ``VLLMRollout``."""
    kv_bytes: int = 0
    """Size of vLLM's KV cache; that of the embedded engine follows from the batch."""
    batch_prompts: int = 64
    """Prompts that the embedded engine samples at a time."""
    dtype_bytes: int = 2
    """Bytes of one number in vLLM's weights and cache."""


@dataclass(frozen=True)
class PromptSize:
    """The size of every prompt of the plan."""

    tokens: int = 1024
    """Including image tokens."""
    images: int = 1
    image_tokens: int = 256
    """Tokens of one image."""


@dataclass(frozen=True)
class PlanSettings:
    """All inputs of the plan."""

    model: PlannedModel
    precision: str = "32-true"
    group_rows: int = 8
    """Rows of a prompt: completions, and demonstrations beside them."""
    max_tokens: int = 256
    batch_prompts: int = 32
    """Prompts of a rollout on this rank."""
    num_minibatches: int = 1
    micro_batch_size: int = 0
    """Rows in one forward and backward; 0: all of a mini-batch."""
    prompt: PromptSize = PromptSize()
    critic: Literal["none", "shared", "head", "separate"] = "none"
    reference: bool = False
    """Whether a frozen copy of the policy is loaded."""
    computes_logprobs: bool = False
    """Whether log-probs or values are computed before the update."""
    entropy_loss: bool = False
    placement: Placement = field(default_factory=Placement)
    ranks: int = 1
    engine: PlannedEngine = PlannedEngine()
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def loaded_model(self) -> PlannedModel:
        """The model in the dtype of its weights in this run."""
        casts = "rl_deepspeed" in self.placement.name and self.precision == "bf16-mixed"  # DeepSpeed keeps fp32 masters
        bfloat16 = casts or self.precision == "bf16-true"
        return dataclasses.replace(self.model, dtype="bfloat16") if bfloat16 else self.model

    @property
    def autocast(self) -> bool:
        """Whether weights are cast layer by layer while they are used."""
        return self.precision == "bf16-mixed" and self.loaded_model.dtype == "float32"

    @property
    def minibatch_rows(self) -> int:
        """Rows of one optimizer step."""
        return max(1, self.batch_prompts // self.num_minibatches) * self.group_rows

    @property
    def micro_batch_rows(self) -> int:
        """Rows of one forward and backward."""
        return min(self.micro_batch_size or self.minibatch_rows, self.minibatch_rows)

    @property
    def accumulates(self) -> bool:
        """Whether an update has several micro-batches, so that gradients exist when a forward begins."""
        return self.micro_batch_rows < self.minibatch_rows

    def replace(self, **changes: object) -> PlanSettings:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_model(self, **changes: object) -> PlanSettings:
        """A copy with some fields of ``model`` changed."""
        return self.replace(model=dataclasses.replace(self.model, **changes))  # type: ignore[arg-type]

    def with_engine(self, **changes: object) -> PlanSettings:
        """A copy with some fields of ``engine`` changed."""
        return self.replace(engine=dataclasses.replace(self.engine, **changes))  # type: ignore[arg-type]
