"""The plan of a run: its phases, and the largest micro-batch and KV cache that would fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch

from rllava_pl.memory.budget import ModelSize, OptimizerCost, PhaseMemory, phases
from rllava_pl.memory.micro_step import MicroStep, StepBytes, logprobs_bytes, step_bytes
from rllava_pl.memory.settings import PlanSettings
from rllava_pl.memory.sizes import MakeOptimizer, model_size, optimizer_cost


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run that does not choose one."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that one process may use."""

    gpu: int
    host: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of every phase, and what they were computed from."""

    settings: PlanSettings
    size: ModelSize
    optimizer: OptimizerCost
    phases: tuple[PhaseMemory, ...]

    def __getitem__(self, name: str) -> PhaseMemory:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def gpu(self) -> int:
        """Bytes on the GPU in the largest phase."""
        return max(phase.gpu for phase in self.phases)

    @property
    def host(self) -> int:
        """Bytes on the host in the largest phase."""
        return max(phase.host for phase in self.phases)

    def fits(self, limits: MemoryLimits) -> bool:
        """Whether every phase is within the limits."""
        return self.excess(limits) == 0

    def excess(self, limits: MemoryLimits) -> int:
        """Bytes over the limits, in both memories."""
        return max(0, self.gpu - limits.gpu) + max(0, self.host - limits.host)


def plan(
    settings: PlanSettings,
    make_optimizer: MakeOptimizer = adamw,
    *,
    step: StepBytes | None = None,
    prefill_bytes: int | None = None,
) -> MemoryPlan:
    """Plan a run.

    Args:
        settings: Of the run.
        make_optimizer: Makes the optimizer from a list of parameters; it takes one step on a small parameter.
        step: Peaks of a micro-step; traced by default, which takes some 10 s for billions of parameters.
        prefill_bytes: Peak of the embedded engine's forward over the prompts; traced by default.

    Raises:
        OSError: The model's config is neither shipped, nor on disk, nor on the hub.
    """
    if step is None:
        rows, group_rows = settings.micro_batch_rows, settings.group_rows
        micro_step = MicroStep(
            settings.loaded_model,
            prompts=max(1, rows // group_rows),  # whole groups, or a part of one
            responses_per_prompt=min(rows, group_rows),
            response_tokens=settings.max_tokens,
            prompt=settings.prompt,
            second_trunk=settings.critic == "separate",
            entropy_loss=settings.entropy_loss,
            autocast=settings.autocast,
        )
        step = step_bytes(micro_step)
    if prefill_bytes is None:
        prompts, model = min(settings.engine.batch_prompts, settings.batch_prompts), settings.loaded_model
        prefill = MicroStep(model, prompts, 1, 1, settings.prompt, autocast=settings.autocast)
        prefill_bytes = logprobs_bytes(prefill) if settings.engine.kind == "embedded" else 0
    size = model_size(settings.loaded_model)
    dtype = getattr(torch, settings.loaded_model.dtype)
    optimizer = optimizer_cost(make_optimizer, dtype, size, on_gpu=settings.device == "cuda")
    return MemoryPlan(settings, size, optimizer, tuple(phases(size, settings, step, prefill_bytes, optimizer)))


def micro_batch_sizes(settings: PlanSettings) -> list[int]:
    """Possible sizes of a micro-batch, smallest first: equal parts of a group, then whole groups, doubling.

    >>> from rllava_pl.memory.settings import PlannedModel
    >>> micro_batch_sizes(PlanSettings(PlannedModel("qwen3_vl_4b"), group_rows=6, batch_prompts=5))
    [1, 2, 3, 6, 12, 24, 30]
    """
    rows, most = settings.group_rows, settings.minibatch_rows
    sizes = [part for part in range(1, rows) if rows % part == 0]
    while rows < most:
        sizes.append(rows)
        rows *= 2
    return [*sizes, most]


def largest_micro_batch(found: MemoryPlan, limits: MemoryLimits, make_optimizer: MakeOptimizer = adamw) -> int:
    """The largest micro-batch whose plan fits, 0 if none does; up to five sizes are traced."""

    def fits(rows: int) -> bool:
        return plan(found.settings.replace(micro_batch_size=rows), make_optimizer).fits(limits)

    sizes = micro_batch_sizes(found.settings)
    if not found.settings.placement.streams_gradients and fits(sizes[-1]):
        return sizes[-1]  # with one micro-batch a step, gradients appear while activations are freed
    return max(sizes[: bisect_left(sizes, True, key=lambda rows: not fits(rows))], default=0)


def largest_kv_cache(found: MemoryPlan, limits: MemoryLimits) -> int:
    """Bytes of keys and values that fit into a rollout beside everything else; 0 for a server's."""
    if found.settings.engine.kind == "server":
        return 0
    rollout = found["rollout"]
    cache = sum(item.gpu + item.host for item in rollout.items if item.what.endswith("KV cache"))
    on_gpu = found.settings.device == "cuda"
    return max(0, (limits.gpu - rollout.gpu if on_gpu else limits.host - rollout.host) + cache)
