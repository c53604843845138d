"""What the memory plan needs to know of a module and its rollout callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from rllava_pl.callbacks.vllm import VLLMRollout
from rllava_pl.callbacks.vllm_server import VLLMServerRollout
from rllava_pl.memory.placement import Placement, host_adamw
from rllava_pl.memory.settings import Engine, EngineMemory, Prompts, Settings, Source
from rllava_pl.memory.units import GIB
from rllava_pl.optim import HostAdamW
from rllava_pl.rollout.callbacks import RolloutCallback, TransformersRollout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from rllava_pl.modules.base import RLModule


def settings_of(
    module: RLModule,
    callbacks: Sequence[object],
    *,
    placement: Placement,
    precision: str,
    ranks: int,
    batch_prompts: int,
    prompts: Prompts,
    device: Literal["cuda", "cpu"],
) -> Settings:
    """The plan's view of a run.

    Args:
        module: The algorithm; it need not have loaded its policy.
        callbacks: Of the Trainer.
        placement: Where the strategy keeps things.
        precision: Of the Trainer.
        ranks: Processes of the run.
        batch_prompts: Prompts of a rollout on each rank.
        prompts: How large a prompt is taken to be.
        device: What computes.
    """
    rollout = next((x for x in callbacks if isinstance(x, RolloutCallback)), TransformersRollout())
    engine = engine_of(rollout, device=device, precision=precision, dtype=module.source.dtype)
    exact = engine.kind == "embedded" and module.source.dtype == "float32" and precision == "32-true"
    return Settings(
        source=Source.of(module.source),
        precision=precision,
        group=module.group_size + module.extra_members,
        max_tokens=module.sampling.max_tokens,
        batch_prompts=batch_prompts,
        minibatches=module.num_minibatches,
        micro_batch_size=module.micro_batch_size,
        prompts=prompts,
        critic=getattr(module, "critic_kind", "none"),
        reference=module.needs_reference and module.source.lora is None,
        evaluates=module.needs_reference or module.needs_values or (module.evaluates_old_logp and not exact),
        entropy_loss=bool(module.entropy_coef),
        placement=placement,
        ranks=ranks,
        engine=engine,
        device=device,
    )


def engine_of(callback: RolloutCallback, *, device: str, precision: str, dtype: str) -> Engine:
    """The engine a rollout callback will build."""
    if isinstance(callback, VLLMServerRollout):
        return Engine("server")
    if isinstance(callback, VLLMRollout):
        auto = "release_kv" if device == "cuda" else "resident"
        memory = cast(EngineMemory, auto if callback.memory == "auto" else callback.memory)
        wide = callback.dtype == "float32" or (callback.dtype, precision, dtype) == ("auto", "32-true", "float32")
        return Engine("vllm", memory, round(callback.kv_cache_gib * GIB), dtype_bytes=4 if wide else 2)
    return Engine("embedded", batch_prompts=getattr(callback, "batch_prompts", 64))


def placement_with(placement: Placement, optimizer: Optimizer) -> Placement:
    """The placement of a strategy with this optimizer: ``HostAdamW`` moves gradients and states to the host."""
    return host_adamw(**optimizer.precisions) if isinstance(optimizer, HostAdamW) else placement
