"""Single changes to a run that does not fit, each with the bytes that it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rllava_pl.memory import placement
from rllava_pl.memory.plan import MemoryLimits, MemoryPlan, adamw, micro_batch_sizes, plan
from rllava_pl.memory.settings import PlanSettings
from rllava_pl.memory.sizes import MakeOptimizer
from rllava_pl.memory.units import gib
from rllava_pl.models.trainable import LoRA


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
    others = [(option, plan(settings, make_optimizer)) for option, settings in changes(found.settings)]
    helpful = [(option, other) for option, other in others if other.excess(limits) < found.excess(limits)]
    helpful.sort(key=lambda pair: pair[1].excess(limits))
    return [Advice(option, found.gpu - x.gpu, found.host - x.host, x.fits(limits)) for option, x in helpful]


def changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    """Everything that one option can change, as it is written in a config."""
    model, engine = settings.model, settings.engine
    if not model.gradient_checkpointing:
        yield "model.policy.gradient_checkpointing: true", settings.with_model(gradient_checkpointing=True)
    if settings.loaded_model.dtype == "float32":
        yield "model.policy.dtype: bfloat16", settings.with_model(dtype="bfloat16").replace(precision="32-true")
    if model.lora is None:
        if "vision_tower" not in model.freeze:
            yield "model.policy.freeze: [vision_tower]", settings.with_model(freeze=(*model.freeze, "vision_tower"))
        yield "model.policy.lora: {r: 16}", settings.with_model(lora=LoRA()).replace(reference=False)
    if smaller := [rows for rows in micro_batch_sizes(settings) if rows < settings.micro_batch_rows]:
        yield f"model.batching.micro_batch_size: {smaller[-1]}", settings.replace(micro_batch_size=smaller[-1])
    if half := settings.max_tokens // 2:
        yield f"model.sampling.max_tokens: {half}", settings.replace(max_tokens=half)
    if settings.device == "cuda":
        for option, other in _placements(settings.ranks):
            yield option, settings.replace(placement=other)
    if engine.kind == "embedded" and engine.batch_prompts > 1:
        half = max(1, min(engine.batch_prompts, settings.batch_prompts) // 2)
        yield f"TransformersRollout.batch_prompts: {half}", settings.with_engine(batch_prompts=half)
    if engine.kind == "vllm":
        for memory in ("release_kv", "sleep"):
            if engine.memory != memory:
                yield f"VLLMRollout.memory: {memory}", settings.with_engine(memory=memory)
        half_gib = gib(engine.kv_bytes / 2)
        yield f"VLLMRollout.kv_cache_gib: {half_gib:g}", settings.with_engine(kv_bytes=engine.kv_bytes // 2)
    if settings.reference:
        yield "model.kl.loss_coef: 0.0", settings.replace(reference=False)
    if settings.critic == "separate":
        yield "model.critic: shared", settings.replace(critic="shared")


def _placements(ranks: int) -> Iterator[tuple[str, placement.Placement]]:
    if ranks == 1:
        for states, gradients in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")):
            option = f"model.optimizer: HostAdamW {{states: {states}, gradients: {gradients}}}"
            yield option, placement.host_adamw(states, gradients)
        return
    yield "trainer.strategy: rl_fsdp2", placement.fsdp()
    for options in ({}, {"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True}):
        written = "".join(f", {name}: true" for name in options)
        yield f"trainer.strategy: rl_deepspeed {{stage: 3{written}}}", placement.deepspeed(**options)
