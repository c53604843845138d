"""What the memory of a run depends on, as one process of it sees it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rllava_pl.memory.placement import Placement, single
from rllava_pl.models.trainable import LoRA

if TYPE_CHECKING:
    from rllava_pl.models.vlm import VLM

SINGLE = single()
EngineKind = Literal["embedded", "vllm", "server"]
EngineMemory = Literal["resident", "release_kv", "sleep", "discard"]


@dataclass(frozen=True)
class Source:
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
    def of(cls, vlm: VLM) -> Source:
        """The same of a policy of the config."""
        values = {field.name: getattr(vlm, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {"freeze": tuple(vlm.freeze)})


@dataclass(frozen=True)
class Engine:
    """Where rollouts come from."""

    kind: EngineKind = "embedded"
    memory: EngineMemory = "resident"
    """What vLLM hands back while the policy is updated."""
    kv_bytes: int = 0
    """vLLM's cache; the embedded engine's follows from the batch."""
    batch_prompts: int = 64
    """Prompts the embedded engine samples at a time."""
    dtype_bytes: int = 2
    """Of vLLM's weights and cache."""


@dataclass(frozen=True)
class Prompts:
    """How large a prompt is taken to be."""

    tokens: int = 1024
    """Image tokens included."""
    images: int = 1
    image_tokens: int = 256
    """Tokens one image becomes."""


@dataclass(frozen=True)
class Settings:
    """Everything the plan needs to know."""

    source: Source
    precision: str = "32-true"
    group: int = 8
    """Rows of a prompt: completions, and what stands beside them."""
    max_tokens: int = 256
    batch_prompts: int = 32
    """Prompts of a rollout on this rank."""
    minibatches: int = 1
    micro_batch_size: int = 0
    """Rows in one forward and backward; 0: all of a mini-batch."""
    prompts: Prompts = Prompts()
    critic: Literal["none", "shared", "head", "separate"] = "none"
    reference: bool = False
    """Whether a frozen copy of the policy is loaded."""
    evaluates: bool = False
    """Whether log-probs are computed before the update."""
    entropy_loss: bool = False
    placement: Placement = SINGLE
    ranks: int = 1
    engine: Engine = Engine()
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def loaded(self) -> Source:
        """The source in the dtype its weights have in this run."""
        casts = "rl_deepspeed" in self.placement.name and self.precision == "bf16-mixed"  # DeepSpeed keeps fp32 masters
        bfloat16 = casts or self.precision == "bf16-true"
        return dataclasses.replace(self.source, dtype="bfloat16") if bfloat16 else self.source

    @property
    def autocast(self) -> bool:
        """Whether weights are cast layer by layer while they are used."""
        return self.precision == "bf16-mixed" and self.loaded.dtype == "float32"

    @property
    def minibatch_rows(self) -> int:
        """Rows of one optimizer step."""
        return max(1, self.batch_prompts // self.minibatches) * self.group

    @property
    def micro_rows(self) -> int:
        """Rows of one forward and backward."""
        return min(self.micro_batch_size or self.minibatch_rows, self.minibatch_rows)

    @property
    def accumulates(self) -> bool:
        """Whether an update has more than one micro-batch, so that gradients are there when a forward begins."""
        return self.micro_rows < self.minibatch_rows

    def replace(self, **changes: object) -> Settings:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_source(self, **changes: object) -> Settings:
        """A copy with some fields of ``source`` changed."""
        return self.replace(source=dataclasses.replace(self.source, **changes))  # type: ignore[arg-type]

    def with_engine(self, **changes: object) -> Settings:
        """A copy with some fields of ``engine`` changed."""
        return self.replace(engine=dataclasses.replace(self.engine, **changes))  # type: ignore[arg-type]
