"""Single changes to a run that does not fit, each with the bytes that it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rllava_pl.memory import placement
from rllava_pl.memory.plan import MemoryLimits, MemoryPlan, adamw, micro_batch_sizes, plan
from rllava_pl.memory.settings import PlanSettings
from rllava_pl.models.trainable import LoRA

if TYPE_CHECKING:
    from rllava_pl.memory.sizes import MakeOptimizer


@dataclass(frozen=True)
class Advice:
    """One change."""

    option: str
    """As it is written in a config."""
    gpu: int
    """Bytes saved on the GPU in the largest phase; negative: more are needed."""
    host: int
    """The same on the host."""
    fits: bool
    """Whether the run fits with this change alone."""


def advise(found: MemoryPlan, limits: MemoryLimits, make_optimizer: MakeOptimizer = adamw) -> list[Advice]:
    """Changes that reduce the excess over the limits, those that reduce it most first."""
    advice = []
    for option, settings in changes(found.settings):
        other = plan(settings, make_optimizer)
        if (excess := other.excess(limits)) < found.excess(limits):
            saved = Advice(option, found.gpu - other.gpu, found.host - other.host, excess == 0)
            advice.append((excess, saved))
    return [item for _, item in sorted(advice, key=lambda pair: pair[0])]


def changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    """Everything that one option can change, as it is written in a config."""
    yield from _model_changes(settings)
    if smaller := [rows for rows in micro_batch_sizes(settings) if rows < settings.micro_batch_rows]:
        option = f"model.batching.micro_batch_size: {smaller[-1]}"
        yield option, settings.replace(micro_batch_size=smaller[-1])
    if settings.max_tokens > 1:
        half = settings.max_tokens // 2
        yield f"model.sampling.max_tokens: {half}", settings.replace(max_tokens=half)
    if settings.device == "cuda":
        yield from _placement_changes(settings)
    yield from _engine_changes(settings)
    if settings.reference:
        yield "model.kl.loss_coef: 0.0", settings.replace(reference=False)
    if settings.critic == "separate":
        yield "model.critic: shared", settings.replace(critic="shared")


def _model_changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    model = settings.model
    if not model.gradient_checkpointing:
        yield "model.policy.gradient_checkpointing: true", settings.with_model(gradient_checkpointing=True)
    if settings.loaded_model.dtype == "float32":
        yield "model.policy.dtype: bfloat16", settings.with_model(dtype="bfloat16").replace(precision="32-true")
    if model.lora is None:
        if "vision_tower" not in model.freeze:
            yield "model.policy.freeze: [vision_tower]", settings.with_model(freeze=(*model.freeze, "vision_tower"))
        yield "model.policy.lora: {r: 16}", settings.with_model(lora=LoRA()).replace(reference=False)


def _placement_changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    if settings.ranks == 1:
        for states, gradients in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")):
            option = f"model.optimizer: HostAdamW {{states: {states}, gradients: {gradients}}}"
            yield option, settings.replace(placement=placement.host_adamw(states, gradients))
        return
    yield "trainer.strategy: rl_fsdp2", settings.replace(placement=placement.fsdp())
    for options in ({}, {"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True}):
        written = ", ".join(["stage: 3", *(f"{name}: true" for name in options)])
        yield (
            f"trainer.strategy: rl_deepspeed {{{written}}}",
            settings.replace(placement=placement.deepspeed(**options)),
        )


def _engine_changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    engine = settings.engine
    if engine.kind == "embedded" and engine.batch_prompts > 1:
        half = max(1, min(engine.batch_prompts, settings.batch_prompts) // 2)
        yield f"TransformersRollout.batch_prompts: {half}", settings.with_engine(batch_prompts=half)
    if engine.kind == "vllm":
        for memory in ("release_kv", "sleep"):
            if engine.memory != memory:
                yield f"VLLMRollout.memory: {memory}", settings.with_engine(memory=memory)
        half_gib = engine.kv_bytes / 2**31
        yield f"VLLMRollout.kv_cache_gib: {half_gib:g}", settings.with_engine(kv_bytes=engine.kv_bytes // 2)
