"""The inputs of the memory plan, read from a module and its rollout callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from torch.optim import Optimizer

from rllava_pl.callbacks.vllm import VLLMRollout, VLLMServerRollout
from rllava_pl.memory.placement import Placement, host_adamw
from rllava_pl.memory.settings import EngineMemory, PlannedEngine, PlannedModel, PlanSettings, PromptSize
from rllava_pl.memory.units import GIB
from rllava_pl.modules import PolicyModule
from rllava_pl.optim import HostAdamW
from rllava_pl.rollout.callbacks import RolloutCallback, TransformersRollout


def settings_of(
    module: PolicyModule,
    callbacks: Sequence[object],
    *,
    placement: Placement,
    precision: str,
    ranks: int,
    batch_prompts: int,
    prompt: PromptSize,
    device: Literal["cuda", "cpu"],
) -> PlanSettings:
    """The inputs of the plan of a run; the policy need not be loaded, ``batch_prompts`` are those of one rank."""
    policy, max_tokens, batching = module.policy, module.sampling.max_tokens, module.batching
    rollout = next((x for x in callbacks if isinstance(x, RolloutCallback)), TransformersRollout())
    engine = planned_engine(rollout, device=device, precision=precision, dtype=policy.dtype)
    exact = engine.kind == "embedded" and policy.dtype == "float32" and precision == "32-true"
    old_logp = getattr(module, "computes_old_logp", False) and not exact
    group_rows, micro_batch_size = module.group_size + module.extra_rows, batching.micro_batch_size
    if batching.micro_batch_tokens:  # rows when every response is of full length
        groups = batching.micro_batch_tokens // (prompt.tokens + group_rows * max_tokens)
        rows = groups * group_rows or max(1, (batching.micro_batch_tokens - prompt.tokens) // max_tokens)
        micro_batch_size = min(rows, micro_batch_size or rows)
    return PlanSettings(
        model=PlannedModel.of(policy),
        precision=precision,
        group_rows=group_rows,
        max_tokens=max_tokens,
        batch_prompts=batch_prompts,
        num_minibatches=batching.num_minibatches,
        micro_batch_size=micro_batch_size,
        prompt=prompt,
        critic=getattr(module, "critic", "none"),
        reference=module.needs_reference and policy.lora is None,
        computes_logprobs=module.needs_reference or module.needs_values or old_logp,
        entropy_loss=bool(getattr(module, "entropy_coef", 0.0)),
        placement=placement,
        ranks=ranks,
        engine=engine,
        device=device,
    )


def planned_engine(callback: RolloutCallback, *, device: str, precision: str, dtype: str) -> PlannedEngine:
    """The engine that a rollout callback will build."""
    if isinstance(callback, VLLMServerRollout):
        return PlannedEngine("server")
    if isinstance(callback, VLLMRollout):
        auto = "release_kv" if device == "cuda" else "resident"
        memory = cast(EngineMemory, auto if callback.memory == "auto" else callback.memory)
        wide = callback.dtype == "float32" or (callback.dtype, precision, dtype) == ("auto", "32-true", "float32")
        return PlannedEngine("vllm", memory, round(callback.kv_cache_gib * GIB), dtype_bytes=4 if wide else 2)
    return PlannedEngine("embedded", batch_prompts=getattr(callback, "batch_prompts", 64))


def placement_with(placement: Placement, optimizer: Optimizer) -> Placement:
    """The placement of a strategy with this optimizer: ``HostAdamW`` keeps gradients and states on the host."""
    return host_adamw(**optimizer.precisions) if isinstance(optimizer, HostAdamW) else placement
