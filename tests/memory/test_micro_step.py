"""Peaks traced with fake tensors equal torch's memory tracker and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from rllava_pl.memory import PlannedModel, PromptSize
from rllava_pl.memory.fake_memory import FakeMemory
from rllava_pl.memory.micro_step import MicroStep, StepBytes, logprobs_bytes, step_bytes
from rllava_pl.memory.sizes import model_size, optimizer_cost
from rllava_pl.models import LoRA, tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with the config of a family: ``directory(family, text layers, vision blocks)``."""

    def make(family: str, layers: int = 2, blocks: int = 2) -> str:
        made = tiny.build(
            tmp_path_factory.getbasetemp() / family, family=family, questions=["a"], answers=["b"], warmup_steps=0
        )
        config = json.loads((made / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = layers
        config["text_config"]["layer_types"] = ["full_attention"] * layers
        vision = config["vision_config"]
        vision["depth" if "depth" in vision else "num_hidden_layers"] = blocks
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [blocks - 1]
        folder = Path(tmp_path_factory.mktemp("config"))
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def test_bytes_of_a_product_and_its_gradients_equal_a_sum_by_hand():
    """One layer of 4 x 4 on 8 rows: 64 B of weight, 128 B an activation."""
    memory = FakeMemory()
    with memory.fake:
        layer, x = nn.Linear(4, 4, bias=False), torch.empty(8, 4)
    memory.ignore(layer)
    with memory, memory.separate_gradients(layer):
        loss = layer(x).square().sum()
        memory.mark()
        loss.backward()
    forward, backward = memory.peaks
    assert forward == (128 + 128 + 4,) * 2  # product, its square, their sum
    alone, with_gradients = backward
    assert with_gradients - alone in (0, 64) and alone >= 2 * 128 + 64  # product, its gradient, the weight's


def test_masks_and_their_counts_are_real():
    memory = FakeMemory()
    with memory.fake:
        x = torch.empty(3, 5)
    with memory:
        mask = torch.tensor([[True, False, True, True, False]] * 3)
        assert x[mask].shape == (9,)
        assert bool(mask.any()) and mask.sum().item() == 9
        big = torch.zeros(1 << 20)
    assert memory.peaks[-1][0] >= 4 << 20
    assert type(big).__name__ == "FakeTensor"  # without memory


def test_the_peak_equals_torchs_tracker():
    """The same two layers, once counted here and once by ``MemTracker``."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    memory = FakeMemory()
    with memory.fake:
        ours, x = model(), torch.empty(32, 64)
    memory.ignore(ours)
    with memory, memory.separate_gradients(ours):
        ours(x).square().sum().backward()
    tracker = MemTracker()
    with memory.fake:
        theirs, x = model(), torch.empty(32, 64)
        tracker.track_external(theirs)
        with tracker:
            theirs(x).square().sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    weights = sum(p.nbytes for p in theirs.parameters())
    assert memory.peaks[-1][1] == pytest.approx(peak - weights, abs=16)  # theirs counts the root of the loss


def step_of(model: PlannedModel, group_size: int = 2) -> StepBytes:
    """A step of the tiny model."""
    return step_bytes(MicroStep(model, 2, group_size, 32, PromptSize(48, 1, 4)))


def test_options_that_save_memory_reduce_the_peak(directory):
    path = directory("qwen3_vl", 4, 4)
    plain = step_of(PlannedModel(path))
    assert step_of(PlannedModel(path, gradient_checkpointing=True)).update < plain.update / 2
    assert step_of(PlannedModel(path, dtype="bfloat16")).update < 0.7 * plain.update
    assert step_of(PlannedModel(path, freeze=("vision_tower",))).update_with_gradients < plain.update_with_gradients
    assert step_of(PlannedModel(path), group_size=1).update < plain.update
    assert plain.logprobs < plain.update <= plain.update_with_gradients
    logprobs = MicroStep(PlannedModel(path), 2, 2, 32, PromptSize(48, 1, 4))
    assert logprobs_bytes(logprobs) == plain.logprobs


def test_shipped_architectures_have_their_published_sizes():
    counts = {
        name: model_size(PlannedModel(name)).parameters for name in ("qwen2_5_vl_3b", "qwen3_vl_4b", "qwen3_vl_8b")
    }
    assert counts == {"qwen2_5_vl_3b": 3_754_622_976, "qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696}
    assert model_size(PlannedModel("Qwen/Qwen3-VL-4B-Instruct", dtype="bfloat16")).kv_bytes == 147_456


def test_frozen_parts_and_adapters_change_the_trained_parameters():
    whole = model_size(PlannedModel("qwen3_vl_4b"))
    frozen = model_size(PlannedModel("qwen3_vl_4b", freeze=("vision_tower", "connector")))
    assert whole.trained - frozen.trained == 415_347_712  # the tower with its mergers
    lora = model_size(PlannedModel("qwen3_vl_4b", lora=LoRA(r=16)))
    widths = 4 * 2560 + 2 * 4096 + 2 * 1024 + 3 * (2560 + 9728)  # inputs and outputs of seven matrices
    assert lora.trained == 36 * 16 * widths


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda p: torch.optim.AdamW(p), 8),
        (lambda p: torch.optim.SGD(p, lr=1.0), 0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 4),
    ],
)
def test_optimizer_states_are_measured(make, moments):
    size = model_size(PlannedModel("qwen3_vl_4b"))
    on_gpu, on_cpu = (optimizer_cost(make, torch.float32, size, on_gpu=flag) for flag in (True, False))
    assert on_gpu.moment_bytes == on_cpu.moment_bytes == moments
    assert on_gpu.scratch_bytes == 4 * size.trained
    assert on_cpu.scratch_bytes == 4 * 2 * size.largest
