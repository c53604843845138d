"""Units of sharding, empty and lazy policies before sharding, and options that are refused."""

from __future__ import annotations

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rllava_pl.distributed.shards import Shard, bounds_within, even_bounds
from rllava_pl.loop.options import KL
from rllava_pl.models.lazy_weights import narrow_dtype
from rllava_pl.models.policy import Policy
from rllava_pl.models.vlm import VLM
from rllava_pl.modules import PPO
from rllava_pl.strategies import RLDeepSpeedStrategy, RLFSDP2Strategy, RLFSDPStrategy, adapter_for
from rllava_pl.strategies.sharding import initial_values, materialize, sharding_units
from tests import runs

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; `make test` does it"
)


@pytest.fixture(scope="module")
def module():
    made = runs.module(PPO, kl=KL(loss_coef=0.1), critic="separate")
    made.configure_model()
    return made


def test_layers_reference_and_value_head_are_units(module) -> None:
    """Two text and two vision layers of policy, critic and reference; then the reference and the value head."""
    found = sharding_units(module)
    layers, whole = found[:-2], found[-2:]
    assert len(layers) == 3 * (2 + 2)
    assert {id(x) for x in whole} == {id(module.reference), id(module.value_head)}
    assert not any(isinstance(unit, Policy) and unit is not module.reference for unit in found)


def test_empty_policy_has_shapes_and_buffers_but_no_values() -> None:
    source = runs.tiny()
    source.prepare(1)
    full, empty = copy.deepcopy(source).load(), source.load(mode="empty")
    assert all(p.is_meta for p in empty.parameters())
    materialize(empty)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in full.named_parameters()
    }
    for (name, there), (_, here) in zip(full.named_buffers(), empty.named_buffers(), strict=True):
        assert torch.equal(there, here), name
    assert (empty.stop_ids, empty.pad_id, empty.shares_prompt) == (full.stop_ids, full.pad_id, full.shares_prompt)


def test_shared_parameters_stay_shared_when_materialized() -> None:
    with torch.device("meta"):
        pair = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    pair[1].weight = pair[0].weight
    materialize(pair)
    assert pair[1].weight is pair[0].weight
    assert not any(p.is_meta for p in pair.parameters())


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (7,), (2, 2, 2)])
def test_bounds_of_all_ranks_cover_the_parameter(ranks: int, shape: tuple[int, ...], monkeypatch) -> None:
    """A parameter alone, and one that begins in the middle of a longer vector."""
    monkeypatch.setattr("rllava_pl.distributed.shards.world_size", lambda: ranks)
    size = torch.Size(shape).numel()
    for bounds in (even_bounds(size, -(-size // ranks)), bounds_within(even_bounds(100, -(-100 // ranks)), 41, size)):
        assert len(bounds) == ranks + 1 and (bounds[0], bounds[-1]) == (0, size)
        assert list(bounds) == sorted(bounds)


def test_single_rank_gathers_a_copy_in_the_dtype_of_the_parameter() -> None:
    local, full = torch.zeros(6), torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)
    shard = Shard(local, (0, 6), full.shape)
    shard.copy_from_rank0(full, local.device)
    assert torch.equal(shard.full_tensor(local.device), full.float())
    assert shard.full_tensor(local.device).data_ptr() != local.data_ptr()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_lazy_policy_leaves_bfloat16_weights_in_their_file(stored: torch.dtype, tmp_path) -> None:
    """Shapes, dtypes and buffers are those of a policy that is read in full, as a float32 file is."""
    tiny = runs.tiny()
    tiny.prepare(1)
    read = tiny.load()
    read.model.to(stored).save_pretrained(tmp_path)
    read.processor.save_pretrained(tmp_path)
    full, lazy = VLM(str(tmp_path)).load(), VLM(str(tmp_path)).load(mode="lazy")
    assert {p.is_meta for p in lazy.parameters()} == {stored == torch.bfloat16}
    assert lazy.model.dtype == lazy.model.config.dtype == torch.float32
    values = initial_values(lazy)
    for name, there in full.state_dict().items():
        assert torch.equal(values[name].to(there.dtype), there), name
    (tmp_path / "model.safetensors").unlink()
    assert narrow_dtype(str(tmp_path), "main") is None


@pytest.mark.parametrize(
    "kind", [RLFSDPStrategy, RLFSDP2Strategy, pytest.param(RLDeepSpeedStrategy, marks=needs_deepspeed)]
)
def test_cpu_is_refused_unless_allowed(kind) -> None:
    cpu = SimpleNamespace(name=lambda: "cpu")
    strategy = kind()
    strategy.accelerator = cpu
    with pytest.raises(ValueError, match=f"{kind.__name__} saves GPU memory and the accelerator is cpu; use `rl_ddp`"):
        adapter_for(strategy).check()
    strategy.allow_cpu = True
    adapter_for(strategy).check()


@needs_deepspeed
def test_offload_of_weights_needs_stage_3() -> None:
    with pytest.raises(ValueError, match="where weights are sharded; the stage is 2"):
        RLDeepSpeedStrategy(2, offload_parameters=True)


@needs_deepspeed
def test_deepspeed_config_has_the_options() -> None:
    config = RLDeepSpeedStrategy(3, offload_optimizer=True, param_persistence_threshold=7, pin_memory=False).config
    assert config["zero_optimization"] == {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 200_000_000,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 7,
        "stage3_max_live_parameters": 1_000_000_000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert "offload_param" not in config["zero_optimization"]
    assert not any(key.startswith("stage3") for key in RLDeepSpeedStrategy(2).config["zero_optimization"])
