"""What to change about a run that does not fit, each with the bytes it saves where the run needs most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rllava_pl.memory import placement
from rllava_pl.memory.plan import Limits, Plan, adamw, micro_batches, plan
from rllava_pl.memory.settings import Settings
from rllava_pl.models.trainable import LoRA

if TYPE_CHECKING:
    from rllava_pl.memory.sizes import MakeOptimizer


@dataclass(frozen=True)
class Advice:
    """One change."""

    option: str
    """As it stands in a config."""
    gpu: int
    """Bytes the largest phase has less on the GPU; negative: more."""
    host: int
    """The same on the host."""
    fits: bool
    """Whether this change alone is enough."""


def advise(found: Plan, limits: Limits, make_optimizer: MakeOptimizer = adamw) -> list[Advice]:
    """Changes that help, what is enough on its own first, then by what it takes off the excess."""
    advice = []
    for option, settings in changes(found.settings):
        other = plan(settings, make_optimizer)
        if other.excess(limits) < found.excess(limits):
            advice.append(
                (
                    other.excess(limits),
                    Advice(option, found.gpu - other.gpu, found.host - other.host, other.fits(limits)),
                )
            )
    return [item for _, item in sorted(advice, key=lambda pair: pair[0])]


def changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Everything that can be changed by one option, as it stands in a config."""
    yield from _of_the_source(settings)
    yield from _of_the_batch(settings)
    yield from _of_the_optimizer(settings)
    yield from _of_the_engine(settings)
    if settings.reference:
        yield "model.kl_loss_coef: 0.0", settings.replace(reference=False)
    if settings.critic == "separate":
        yield "model.critic: shared", settings.replace(critic="shared")


def _of_the_source(settings: Settings) -> Iterator[tuple[str, Settings]]:
    source = settings.source
    if not source.gradient_checkpointing:
        yield "model.policy.gradient_checkpointing: true", settings.with_source(gradient_checkpointing=True)
    if settings.loaded.dtype == "float32":
        yield "model.policy.dtype: bfloat16", settings.with_source(dtype="bfloat16").replace(precision="32-true")
    if source.lora is None:
        if "vision_tower" not in source.freeze:
            yield "model.policy.freeze: [vision_tower]", settings.with_source(freeze=(*source.freeze, "vision_tower"))
        yield "model.policy.lora: {r: 16}", settings.with_source(lora=LoRA()).replace(reference=False)


def _of_the_batch(settings: Settings) -> Iterator[tuple[str, Settings]]:
    if smaller := [rows for rows in micro_batches(settings) if rows < settings.micro_rows]:
        yield f"model.micro_batch_size: {smaller[-1]}", settings.replace(micro_batch_size=smaller[-1])
    if settings.max_tokens > 1:
        half = settings.max_tokens // 2
        yield f"model.sampling.max_tokens: {half}", settings.replace(max_tokens=half)


def _of_the_optimizer(settings: Settings) -> Iterator[tuple[str, Settings]]:
    if settings.device == "cpu":
        return
    if settings.ranks == 1:
        for states, gradients in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")):
            option = f"model.optimizer: HostAdamW {{states: {states}, gradients: {gradients}}}"
            yield option, settings.replace(placement=placement.host_adamw(states, gradients))
        return
    yield "trainer.strategy: rl_fsdp2", settings.replace(placement=placement.fsdp())
    yield "trainer.strategy: rl_deepspeed {stage: 3}", settings.replace(placement=placement.deepspeed())
    offload = "trainer.strategy: rl_deepspeed {stage: 3, offload_optimizer: true"
    yield offload + "}", settings.replace(placement=placement.deepspeed(offload_optimizer=True))
    everything = placement.deepspeed(offload_optimizer=True, offload_parameters=True)
    yield offload + ", offload_parameters: true}", settings.replace(placement=everything)


def _of_the_engine(settings: Settings) -> Iterator[tuple[str, Settings]]:
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
