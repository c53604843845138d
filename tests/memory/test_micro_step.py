"""Peaks traced with fake tensors, against torch's own tracker, full depth and arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from rllava_pl.memory import Prompts, Source
from rllava_pl.memory.fake_memory import FakeMemory
from rllava_pl.memory.micro_step import Computation, MicroStep, Rows, along, extrapolated, peaks_of, traced
from rllava_pl.memory.sizes import optimizer_cost, shapes_of
from rllava_pl.models import LoRA, tiny

ROWS = Rows(prompts=2, members=2, response_tokens=6, prompt=Prompts(tokens=12, images=1, image_tokens=4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a family's config and nothing else that matters: ``directory(family, text layers, blocks)``."""

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


def test_a_product_and_its_gradients_by_hand():
    """One layer of 4 x 4 on 8 rows: 64 B of weight, 128 B an activation."""
    memory = FakeMemory()
    with memory.fake:
        layer, x = nn.Linear(4, 4, bias=False), torch.empty(8, 4)
    memory.ignore(layer)
    with memory, memory.gradients_kept(layer):
        memory.moment = ("forward", "rest", 0)
        loss = layer(x).square().sum()
        memory.moment = ("backward", "rest", 0)
        loss.backward()
    assert memory.peaks["forward", "rest", 0] == (128 + 128 + 4,) * 2  # product, its square, their sum
    without, kept = memory.peaks["backward", "rest", 0]
    assert kept - without in (0, 64) and without >= 2 * 128 + 64  # product, its gradient, the weight's


def test_masks_and_counts_stay_real():
    memory = FakeMemory()
    with memory.fake:
        x = torch.empty(3, 5)
    with memory:
        mask = torch.tensor([[True, False, True, True, False]] * 3)
        assert x[mask].shape == (9,)
        assert bool(mask.any()) and mask.sum().item() == 9
        big = torch.zeros(1 << 20)
    assert memory.peaks[memory.moment][0] >= 4 << 20
    assert type(big).__name__ == "FakeTensor"  # nothing of it was allocated


def test_the_peak_is_that_of_torchs_tracker():
    """The same two layers, once counted here and once by ``MemTracker``."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    memory = FakeMemory()
    with memory.fake:
        ours, x = model(), torch.empty(32, 64)
    memory.ignore(ours)
    with memory, memory.gradients_kept(ours):
        ours(x).square().sum().backward()
    tracker = MemTracker()
    with memory.fake:
        theirs, x = model(), torch.empty(32, 64)
        tracker.track_external(theirs)
        with tracker:
            theirs(x).square().sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    weights = sum(p.nbytes for p in theirs.parameters())
    assert memory.peaks[memory.moment][1] == pytest.approx(peak - weights, abs=16)  # theirs counts the loss's root


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpointing"), [("idefics3", False), ("qwen3_vl", True)])
def test_few_layers_say_what_many_take(directory, family, checkpointing):
    """Every moment of 8 text layers and 7 blocks, from models of 5 or 6."""
    computation = Computation(Source(directory(family, 8, 7), gradient_checkpointing=checkpointing))
    found, full = peaks_of(computation, ROWS), traced(computation, ROWS, 8, 7)
    assert found.keys() == full.keys()
    assert {moment for moment in full if found[moment] != pytest.approx(full[moment])} == set()


def test_peaks_at_each_moment_are_affine_in_both_depths():
    def at(layers: int, blocks: int) -> dict[tuple[str, str, str], tuple[float, float]]:
        return {("forward", "text", "last"): (7 + 3 * layers + 2 * blocks, 5 * layers), ("score", "rest", "0"): (4, 4)}

    assert extrapolated(at, (36, 24), (5, 5)) == at(36, 24)
    assert extrapolated(at, (2, 24), (5, 5)) == at(2, 24)
    assert extrapolated(at, (36, 0), (5, 5)) == at(36, 0)


def test_a_line_through_two_micro_batches():
    moment = ("forward", "rest", "0")
    assert along({moment: (10, 20)}, {moment: (14, 20)}, 3) == {moment: (22, 20)}


def test_the_step_is_the_largest_moment_of_its_pass():
    peaks = {
        ("score", "rest", "0"): (5.0, 5.0),
        ("forward", "text", "last"): (9.0, 9.0),
        ("backward", "text", "first"): (7.0, 30.0),
    }
    assert MicroStep.of(peaks) == MicroStep(streamed=9, kept=30, scoring=5)


def step_of(source: Source, **rows: int) -> MicroStep:
    """A step of the tiny model."""
    return MicroStep.of(peaks_of(Computation(source), Rows(**({"prompts": 2, "members": 2} | rows), **SIZES)))


SIZES = {"response_tokens": 32, "prompt": Prompts(48, 1, 4)}


def test_what_is_meant_to_save_memory_does(directory):
    path = directory("qwen3_vl", 4, 4)
    plain = step_of(Source(path))
    assert step_of(Source(path, gradient_checkpointing=True)).streamed < plain.streamed / 2
    assert step_of(Source(path, dtype="bfloat16")).streamed < 0.7 * plain.streamed
    assert step_of(Source(path, freeze=("vision_tower",))).kept < plain.kept
    assert step_of(Source(path), members=1).streamed < plain.streamed
    assert plain.scoring < plain.streamed <= plain.kept


def test_shipped_architectures_have_the_published_sizes():
    counts = {name: shapes_of(Source(name)).parameters for name in ("qwen2_5_vl_3b", "qwen3_vl_4b", "qwen3_vl_8b")}
    assert counts == {"qwen2_5_vl_3b": 3_754_622_976, "qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696}
    assert shapes_of(Source("Qwen/Qwen3-VL-4B-Instruct", dtype="bfloat16")).kv_bytes == 147_456


def test_freezing_and_adapters_are_the_packages_own():
    whole = shapes_of(Source("qwen3_vl_4b"))
    frozen = shapes_of(Source("qwen3_vl_4b", freeze=("vision_tower", "connector")))
    assert whole.trained - frozen.trained == 415_347_712  # the tower with its mergers
    lora = shapes_of(Source("qwen3_vl_4b", lora=LoRA(r=16)))
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
def test_an_optimizer_is_asked_what_it_keeps(make, moments):
    shapes = shapes_of(Source("qwen3_vl_4b"))
    on_gpu, on_cpu = (optimizer_cost(make, torch.float32, shapes, on_gpu=flag) for flag in (True, False))
    assert on_gpu.moment_bytes == on_cpu.moment_bytes == moments
    assert on_gpu.scratch_bytes == 4 * shapes.trained
    assert on_cpu.scratch_bytes == 4 * 2 * shapes.largest
