"""The memory that a run will need in each phase, computed before it starts, and what to change if it does not fit."""

from rllava_pl.memory.advice import Advice, advise
from rllava_pl.memory.budget import MemoryItem, PhaseMemory
from rllava_pl.memory.placement import Placement, placement_of
from rllava_pl.memory.plan import MemoryLimits, MemoryPlan, largest_kv_cache, largest_micro_batch, plan
from rllava_pl.memory.settings import PlannedEngine, PlannedModel, PlanSettings, PromptSize
from rllava_pl.memory.units import parse_bytes

__all__ = [
    "Advice",
    "MemoryItem",
    "MemoryLimits",
    "MemoryPlan",
    "PhaseMemory",
    "Placement",
    "PlanSettings",
    "PlannedEngine",
    "PlannedModel",
    "PromptSize",
    "advise",
    "largest_kv_cache",
    "largest_micro_batch",
    "parse_bytes",
    "placement_of",
    "plan",
]
