"""Bytes of every phase, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from rllava_pl.memory import Engine, Placement, Prompts, Settings, Source, parse_bytes
from rllava_pl.memory.budget import (
    CONTEXT_BYTES,
    FRAGMENT_BYTES,
    PROCESS_BYTES,
    STAGING_BYTES,
    OptimizerCost,
    Phase,
    Shapes,
    Steps,
    kv_cache_bytes,
    phases,
)
from rllava_pl.memory.placement import ddp, deepspeed, fsdp, host_adamw, placement_of, single

SHAPES = Shapes(
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
STEPS = Steps(streamed=70, kept=90, scoring=40, prefill=30)
ADAMW = OptimizerCost(moment_bytes=4.0, scratch_bytes=600.0)
SERVER = Engine("server")


def of(name: str, **options: object) -> Phase:
    """One phase of a run on a GPU with rollouts from a server."""
    settings = Settings(Source("none"), **({"engine": SERVER, "evaluates": True} | options))
    return next(phase for phase in phases(SHAPES, settings, STEPS, ADAMW) if phase.name == name)


def gpu(name: str, **options: object) -> int:
    """Bytes on the GPU that are computed."""
    return sum(line.gpu for line in of(name, **options).lines if not line.assumed)


def host(name: str, **options: object) -> int:
    """Bytes on the host that are computed."""
    return sum(line.host for line in of(name, **options).lines if not line.assumed)


def test_one_device_holds_weights_moments_and_what_an_update_makes():
    resting = 1000 * 2 + 800 * 4
    assert gpu("load") == 2000
    assert gpu("reference") == resting + 40
    assert gpu("update") == resting + 90  # one micro-batch: gradients appear while activations go
    assert gpu("update", micro_batch_size=8) == resting + 800 * 2 + 70  # of several: they are there from the start
    assert gpu("optimizer") == resting + 800 * 2 + 600
    assert gpu("save") == resting
    assert host("load") == 2000 and host("save") == 300 * 4


def test_what_is_assumed_stands_apart():
    assumed = [line for line in of("update").lines if line.assumed]
    assert sum(line.gpu for line in assumed) == CONTEXT_BYTES + FRAGMENT_BYTES
    assert sum(line.host for line in assumed) == PROCESS_BYTES


def test_on_a_cpu_everything_is_host_memory_and_nothing_is_assumed():
    update = of("update", device="cpu")
    assert update.gpu == 0
    assert update.host == 1000 * 2 + 800 * 4 + 90
    assert not any(line.assumed for line in update.lines)


def test_ddp_holds_gradients_twice():
    assert gpu("update", placement=ddp(), ranks=4, micro_batch_size=8) == 2000 + 3200 + 2 * 1600 + 70


def test_fsdp_cuts_everything_and_gathers_two_layers_and_the_root():
    resting = (2000 + 3200) // 4
    whole = (2 * 100 + 400) * 2
    assert gpu("reference", placement=fsdp(), ranks=4) == resting + 40 + whole
    assert gpu("update", placement=fsdp(), ranks=4) == resting + 1600 // 4 + 70 + whole
    assert gpu("optimizer", placement=fsdp(), ranks=4) == resting + 1600 // 4 + 600 // 4


def test_zero_cuts_by_stage():
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
def test_the_host_optimizer_leaves_weights_and_activations_on_the_gpu(states, gradients, bytes_a_parameter):
    placement = host_adamw(states, gradients)
    assert gpu("update", placement=placement) == 2000 + 70
    assert gpu("optimizer", placement=placement) == 2000
    assert host("update", placement=placement) - STAGING_BYTES == pytest.approx(800 * bytes_a_parameter, abs=1)


@pytest.mark.parametrize(("weight_bytes", "bytes_a_parameter"), [(2, 16), (4, 12)])
def test_on_a_host_that_trains_its_own_weights_fp32_needs_no_masters(weight_bytes, bytes_a_parameter):
    shapes = dataclasses.replace(SHAPES, weight_bytes=weight_bytes)
    settings = Settings(Source("none"), placement=host_adamw(), device="cpu", engine=SERVER)
    found = next(phase for phase in phases(shapes, settings, STEPS, ADAMW) if phase.name == "save")
    assert found.host == 1000 * weight_bytes + 800 * bytes_a_parameter


@pytest.mark.parametrize(
    ("memory", "asleep", "on_host"), [("resident", 2500, 0), ("release_kv", 2000, 0), ("sleep", 0, 2000)]
)
def test_vllm_hands_back_what_its_mode_says(memory, asleep, on_host):
    engine = Engine("vllm", memory, kv_bytes=500)
    assert gpu("rollout", engine=engine) == 2000 + 3200 + 2000 + 500
    assert gpu("update", engine=engine) == 2000 + 3200 + 90 + asleep
    assert host("update", engine=engine) == on_host


def test_the_embedded_engine_needs_a_cache_and_room_to_draw():
    engine = Engine(batch_prompts=2)
    cache = 2 * 8 * (10 + 6) * 8  # prompts x group x tokens x bytes
    draws = 2 * 8 * 50 * 24  # rows x vocabulary x bytes, more than reading the prompts takes
    got = gpu("rollout", engine=engine, max_tokens=6, prompts=Prompts(10, 0, 0))
    assert got == 2000 + 3200 + cache + cache // 6 + draws


def test_reference_and_critic_are_further_models():
    assert gpu("load", reference=True) == 4000
    assert gpu("load", critic="separate") == 4000
    assert gpu("save", critic="separate") == 4000 + 2 * 3200


def test_phases_that_a_run_does_not_have_are_left_out():
    names = [p.name for p in phases(SHAPES, Settings(Source("none")), STEPS, ADAMW)]
    assert names == ["load", "rollout", "update", "optimizer", "save"]


def test_keys_and_values_of_the_4b():
    assert kv_cache_bytes(16, 2048, 36 * 2 * 8 * 128 * 2) == 4.5 * 2**30


def test_strategies_are_known_by_name_and_by_class():
    assert placement_of("auto", {}) == single() == Placement()
    assert placement_of("rl_fsdp2", {}) == placement_of("rllava_pl.strategies.fsdp2.RLFSDP2Strategy", {}) == fsdp()
    assert placement_of("RLDeepSpeedStrategy", {"stage": 2, "allow_cpu": True}) == deepspeed(2)
    with pytest.raises(ValueError, match="no memory plan for the strategy 'horovod'; it knows auto, rl_ddp"):
        placement_of("horovod", {})


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("64 GB", 64 * 10**9), ("1.5e9", 1_500_000_000), ("512MiB", 2**29)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24 gigs", "GiB", "-1GB", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size; write a number and a unit"):
        parse_bytes(text)
