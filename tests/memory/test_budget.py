"""Bytes of every phase equal sums by hand."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from rllava_pl.memory import (
    MemoryLimits,
    PhaseMemory,
    Placement,
    PlannedEngine,
    PlannedModel,
    PlanSettings,
    PromptSize,
    largest_micro_batch,
    parse_bytes,
    plan,
)
from rllava_pl.memory.budget import (
    CONTEXT_BYTES,
    FRAGMENT_BYTES,
    PROCESS_BYTES,
    STAGING_BYTES,
    ModelSize,
    OptimizerCost,
    kv_cache_bytes,
    phases,
)
from rllava_pl.memory.micro_step import MicroStep, StepBytes
from rllava_pl.memory.placement import ddp, deepspeed, fsdp, host_adamw, placement_of, single
from rllava_pl.memory.plan import micro_batch_sizes
from rllava_pl.memory.units import GIB

SIZE = ModelSize(
    parameters=1000,
    trained=800,
    largest=300,
    layer=100,
    root=400,
    buffer_bytes=0,
    weight_bytes=2,
    kv_bytes=8,
    layers=6,
    vocabulary=50,
)
STEP = StepBytes(update=70, update_with_gradients=90, logprobs=40)
PREFILL_BYTES = 30
ADAMW = OptimizerCost(moment_bytes=4.0, scratch_bytes=600.0)
SERVER = PlannedEngine("server")


def of(name: str, **options: object) -> PhaseMemory:
    """One phase of a run on a GPU with rollouts from a server."""
    settings = PlanSettings(PlannedModel("none"), **({"engine": SERVER, "computes_logprobs": True} | options))
    return next(phase for phase in phases(SIZE, settings, STEP, PREFILL_BYTES, ADAMW) if phase.name == name)


def gpu(name: str, **options: object) -> int:
    """Bytes on the GPU that are computed."""
    return sum(item.gpu for item in of(name, **options).items if not item.assumed)


def host(name: str, **options: object) -> int:
    """Bytes on the host that are computed."""
    return sum(item.host for item in of(name, **options).items if not item.assumed)


def test_one_device_holds_weights_moments_and_activations():
    resting = 1000 * 2 + 800 * 4
    assert gpu("load") == 2000
    assert gpu("logprobs") == resting + 40
    assert gpu("update") == resting + 90  # one micro-batch: gradients appear while activations go
    assert gpu("update", micro_batch_size=8) == resting + 800 * 2 + 70  # of several: gradients exist from the start
    assert gpu("optimizer") == resting + 800 * 2 + 600
    assert gpu("save") == resting
    assert host("load") == 2000 and host("save") == 300 * 4


def test_assumed_items_are_separate():
    assumed = [item for item in of("update").items if item.assumed]
    assert sum(item.gpu for item in assumed) == CONTEXT_BYTES + FRAGMENT_BYTES
    assert sum(item.host for item in assumed) == PROCESS_BYTES


def test_a_cpu_run_has_host_memory_only_and_no_assumed_items():
    update = of("update", device="cpu")
    assert update.gpu == 0
    assert update.host == 1000 * 2 + 800 * 4 + 90
    assert not any(item.assumed for item in update.items)


def test_ddp_holds_gradients_twice():
    assert gpu("update", placement=ddp(), ranks=4, micro_batch_size=8) == 2000 + 3200 + 2 * 1600 + 70


def test_fsdp_shards_everything_and_gathers_two_layers_and_the_root():
    resting = (2000 + 3200) // 4
    gathered = (2 * 100 + 400) * 2
    assert gpu("logprobs", placement=fsdp(), ranks=4) == resting + 40 + gathered
    assert gpu("update", placement=fsdp(), ranks=4) == resting + 1600 // 4 + 70 + gathered
    assert gpu("optimizer", placement=fsdp(), ranks=4) == resting + 1600 // 4 + 600 // 4


def test_zero_shards_by_stage():
    states = 800 * (8 + 4)

    def update(stage: int) -> int:
        placement = deepspeed(stage, reduce_bucket_size=10, max_live_parameters=200, prefetch_bucket_size=50)
        return gpu("update", placement=placement, ranks=4, micro_batch_size=8) - 2 * 10 * 2 - 70

    assert update(1) == 2000 + states // 4 + 1600
    assert update(2) == 2000 + states // 4 + 1600 // 4
    assert update(3) == 2000 // 4 + states // 4 + 1600 // 4 + 250 * 2


def test_zero_offload_moves_states_and_weights_to_the_host():
    placement = deepspeed(3, True, True, reduce_bucket_size=0, max_live_parameters=200, prefetch_bucket_size=50)
    assert gpu("update", placement=placement, ranks=4) == 250 * 2 + 70
    assert host("update", placement=placement, ranks=4) == (2000 + 800 * (12 + 4)) // 4 + STAGING_BYTES


@pytest.mark.parametrize(
    ("states", "gradients", "bytes_a_parameter"),
    [("float32", "float32", 16), ("float32", "bfloat16", 14), ("bfloat16", "bfloat16", 10), ("int8", "bfloat16", 4.03)],
)
def test_host_adamw_keeps_only_weights_and_activations_on_the_gpu(states, gradients, bytes_a_parameter):
    placement = host_adamw(states, gradients)
    assert gpu("update", placement=placement) == 2000 + 70
    assert gpu("optimizer", placement=placement) == 2000
    assert host("update", placement=placement) - STAGING_BYTES == pytest.approx(800 * bytes_a_parameter, abs=1)


@pytest.mark.parametrize(("weight_bytes", "bytes_a_parameter"), [(2, 16), (4, 12)])
def test_fp32_weights_on_a_cpu_need_no_master_weights(weight_bytes, bytes_a_parameter):
    size = dataclasses.replace(SIZE, weight_bytes=weight_bytes)
    settings = PlanSettings(PlannedModel("none"), placement=host_adamw(), device="cpu", engine=SERVER)
    found = next(phase for phase in phases(size, settings, STEP, PREFILL_BYTES, ADAMW) if phase.name == "save")
    assert found.host == 1000 * weight_bytes + 800 * bytes_a_parameter


@pytest.mark.parametrize(
    ("memory", "asleep", "on_host"), [("resident", 2500, 0), ("release_kv", 2000, 0), ("sleep", 0, 2000)]
)
def test_vllm_frees_what_its_memory_mode_says(memory, asleep, on_host):
    engine = PlannedEngine("vllm", memory, kv_bytes=500)
    assert gpu("rollout", engine=engine) == 2000 + 3200 + 2000 + 500
    assert gpu("update", engine=engine) == 2000 + 3200 + 90 + asleep
    assert host("update", engine=engine) == on_host


def test_the_embedded_engine_needs_a_cache_and_memory_to_sample():
    engine = PlannedEngine(batch_prompts=2)
    cache = 2 * 8 * (10 + 6) * 8  # prompts x group x tokens x bytes
    sampling = 2 * 8 * 50 * 24  # rows x vocabulary x bytes, more than reading the prompts takes
    got = gpu("rollout", engine=engine, max_tokens=6, prompt=PromptSize(10, 0, 0))
    assert got == 2000 + 3200 + cache + cache // 6 + sampling


def test_reference_and_separate_critic_add_models():
    assert gpu("load", reference=True) == 4000
    assert gpu("load", critic="separate") == 4000
    assert gpu("save", critic="separate") == 4000 + 2 * 3200


def test_phases_without_use_are_left_out():
    names = [p.name for p in phases(SIZE, PlanSettings(PlannedModel("none")), STEP, PREFILL_BYTES, ADAMW)]
    assert names == ["load", "rollout", "update", "optimizer", "save"]


def test_kv_cache_of_the_4b():
    assert kv_cache_bytes(16, 2048, 36 * 2 * 8 * 128 * 2) == 4.5 * 2**30


def test_strategies_are_found_by_name_and_by_class():
    assert placement_of("auto", {}) == single() == Placement()
    assert placement_of("rl_fsdp2", {}) == placement_of("rllava_pl.strategies.fsdp.RLFSDP2Strategy", {}) == fsdp()
    assert placement_of("RLDeepSpeedStrategy", {"stage": 2, "allow_cpu": True}) == deepspeed(2)
    with pytest.raises(ValueError, match="no memory plan for the strategy 'horovod'; it must be auto, rl_ddp"):
        placement_of("horovod", {})


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("64 GB", 64 * 10**9), ("1.5e9", 1_500_000_000), ("512MiB", 2**29)]
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24 gigs", "GiB", "-1GB", ""])
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size; write a number and a unit"):
        parse_bytes(text)


def test_largest_micro_batch_equals_a_search_over_all_sizes(monkeypatch):
    """Also where the whole mini-batch needs less than a part of it, since its gradients replace activations."""

    def traced(step: MicroStep) -> StepBytes:
        rows = step.prompts * step.responses_per_prompt
        return StepBytes(update=rows * 16 * GIB, update_with_gradients=rows * 10 * GIB, logprobs=0)

    module = sys.modules["rllava_pl.memory.plan"]
    monkeypatch.setattr(module, "step_bytes", traced)
    monkeypatch.setattr(module, "model_size", lambda _: SIZE)
    settings = PlanSettings(PlannedModel("none"), group_rows=6, batch_prompts=5, engine=SERVER)
    sizes = {rows: plan(settings.replace(micro_batch_size=rows)) for rows in micro_batch_sizes(settings)}
    largest = []
    for gib in (10, 20, 40, 100, 200, 350):
        limits = MemoryLimits(gpu=gib * GIB, host=100 * GIB)
        largest.append(max((rows for rows, found in sizes.items() if found.fits(limits)), default=0))
        assert largest_micro_batch(sizes[30], limits) == largest[-1]
    assert largest == [0, 1, 2, 6, 12, 30]
    assert sizes[30].gpu < sizes[24].gpu
