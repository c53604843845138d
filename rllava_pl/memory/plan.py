"""The plan of a run: its phases, what of a larger micro-batch or cache would still fit, and what could be changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rllava_pl.memory.budget import OptimizerCost, Phase, Shapes, Steps, phases
from rllava_pl.memory.micro_step import Computation, MicroStep, Peaks, Rows, along, peaks_of
from rllava_pl.memory.settings import Settings
from rllava_pl.memory.sizes import optimizer_cost, shapes_of

if TYPE_CHECKING:
    from rllava_pl.memory.sizes import MakeOptimizer


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run whose config names none."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


@dataclass(frozen=True)
class Limits:
    """What one process may use."""

    gpu: int
    host: int


@dataclass(frozen=True)
class Plan:
    """Bytes of every phase, and the facts behind them."""

    settings: Settings
    shapes: Shapes
    steps: Steps
    optimizer: OptimizerCost
    phases: tuple[Phase, ...]

    def __getitem__(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def gpu(self) -> int:
        """Bytes on the GPU in the largest phase."""
        return max(phase.gpu for phase in self.phases)

    @property
    def host(self) -> int:
        """Bytes on the host in the largest phase."""
        return max(phase.host for phase in self.phases)

    def fits(self, limits: Limits) -> bool:
        """Whether every phase does."""
        return self.gpu <= limits.gpu and self.host <= limits.host

    def excess(self, limits: Limits) -> int:
        """Bytes over the limits, of both memories."""
        return max(0, self.gpu - limits.gpu) + max(0, self.host - limits.host)


def plan(settings: Settings, make_optimizer: MakeOptimizer = adamw) -> Plan:
    """The plan of a run.

    Raises:
        OSError: The model's config cannot be had.
    """
    step = MicroStep.of(traced_rows(settings, settings.micro_rows))
    prefill = _prefill(settings) if settings.engine.kind == "embedded" else 0
    steps = Steps(step.streamed, step.kept, step.scoring, prefill)
    return planned(settings, steps, make_optimizer)


def planned(settings: Settings, steps: Steps, make_optimizer: MakeOptimizer = adamw) -> Plan:
    """The plan of a run whose computations are known."""
    shapes = shapes_of(settings.loaded)
    dtype = getattr(torch, settings.loaded.dtype)
    optimizer = optimizer_cost(make_optimizer, dtype, shapes, on_gpu=settings.device == "cuda")
    return Plan(settings, shapes, steps, optimizer, tuple(phases(shapes, settings, steps, optimizer)))


def traced_rows(settings: Settings, rows: int) -> Peaks:
    """Peaks of a micro-step of ``rows`` rows: whole groups, or a part of one."""
    computation = Computation(settings.loaded, settings.critic == "separate", settings.entropy_loss, settings.autocast)
    prompts, members = max(1, rows // settings.group), min(rows, settings.group)
    return peaks_of(computation, Rows(prompts, members, settings.max_tokens, settings.prompts))


def _prefill(settings: Settings) -> int:
    """Reading the prompts of a rollout grows with their number: traced for one and for two."""
    computation = Computation(settings.loaded, autocast=settings.autocast)
    one, two = (peaks_of(computation, Rows(k, 1, 1, settings.prompts)) for k in (1, 2))
    prompts = min(settings.engine.batch_prompts, settings.batch_prompts)
    return MicroStep.of(along(one, two, prompts - 1)).scoring


# -- what else would fit ---------------------------------------------------------------------------------------------


def micro_batches(settings: Settings) -> list[int]:
    """Sizes a micro-batch may have, smallest first: equal parts of a group, then whole groups, doubling.

    >>> from rllava_pl.memory.settings import Source
    >>> micro_batches(Settings(Source("qwen3_vl_4b"), group=6, batch_prompts=5))
    [1, 2, 3, 6, 12, 24, 30]
    """
    group, most = settings.group, settings.minibatch_rows
    sizes = [rows for rows in range(1, group) if group % rows == 0]
    while group < most:
        sizes.append(group)
        group *= 2
    return [*sizes, most]


def largest_micro_batch(found: Plan, limits: Limits, make_optimizer: MakeOptimizer = adamw) -> int:
    """The largest micro-batch whose plan fits, 0 if none does."""
    settings = found.settings

    def fits(rows: int, peaks: Peaks) -> bool:
        step = MicroStep.of(peaks)
        steps = dataclasses.replace(found.steps, streamed=step.streamed, kept=step.kept, scoring=step.scoring)
        return planned(settings.replace(micro_batch_size=rows), steps, make_optimizer).fits(limits)

    group = min(settings.group, settings.minibatch_rows)
    whole, sizes = traced_rows(settings, group), micro_batches(settings)
    if not fits(group, whole):
        one = traced_rows(settings, 1)
        parts = [rows for rows in sizes if rows < group]
        return max((n for n in parts if fits(n, along(one, whole, (n - 1) / (group - 1)))), default=0)
    if group == settings.minibatch_rows:
        return group
    two = traced_rows(settings, 2 * group)
    return max(n for n in sizes if n >= group and fits(n, along(whole, two, n / group - 1)))


def largest_cache(found: Plan, limits: Limits) -> int:
    """Bytes of keys and values for which a rollout has room, beside everything else; 0 for a server's."""
    if found.settings.engine.kind == "server":
        return 0
    rollout = found["rollout"]
    cache = sum(line.gpu + line.host for line in rollout.lines if line.what.endswith("KV cache"))
    on_gpu = found.settings.device == "cuda"
    return max(0, (limits.gpu - rollout.gpu if on_gpu else limits.host - rollout.host) + cache)
