"""The benchmarks of memory and of the host optimizer run at toy sizes on the CPU; figures are not asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rllava_pl.models.architectures import architecture
from rllava_pl.types import Score

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def with_unequal_rewards(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Every rollout gets another reward, so that no group is uninformative, whatever random weights sample."""
    rewards = count()
    monkeypatch.setattr(module.IdSum, "score", lambda self, rollout: Score(float(next(rewards))))
    return module


def out_of_memory(self, closure):
    raise torch.OutOfMemoryError("no room for the step")


@pytest.mark.slow  # the plan traces a model six times
def test_every_phase_of_a_run_is_measured_beside_the_plan(monkeypatch, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    gpu = with_unequal_rewards(script("gpu_24gb"), monkeypatch)
    gpu.main(["--size", "tiny", "--states", "int8", "--rollouts", "2", "--output", str(file)])
    report = json.loads(file.read_text())
    assert {"load", "rollout", "logprobs", "update"} <= report["phases"].keys()
    for name in ("rollout", "logprobs", "update"):
        row = report["phases"][name]
        assert row["seconds"] > 0 and row["host_bytes"] > row["predicted_host_bytes"] > 0
    assert len(report["rollouts"]) == 2
    for row in report["rollouts"]:
        assert row["response_tokens"] == 2 * 4 * 8  # prompts x group x budget: random weights do not stop
        assert row["sampled_tokens_a_second"] > 0 and row["trained_tokens_a_second"] > 0 and row["grad_norm"] > 0
    assert report["machine"]["device"] == "cpu"
    assert "427,584 parameters" in capsys.readouterr().out


@pytest.mark.slow  # 151,936 logits a token
def test_published_architecture_runs_with_the_tokenizer_of_the_tiny_model(monkeypatch, tmp_path):
    """At its vocabulary and patch size; narrow and with few layers for the CPU."""
    gpu = with_unequal_rewards(script("gpu_24gb"), monkeypatch)

    def narrow(name):
        config = architecture(name)
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = 64, 64, 3, 8
        vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.out_hidden_size = 32, 32, 2, 64
        vision.depth, vision.deepstack_visual_indexes = 4, [0, 1, 2]
        return config

    monkeypatch.setattr(gpu, "architecture", narrow)
    monkeypatch.setattr(gpu, "planned", lambda *_: Namespace(phases=(), size=Namespace(parameters=0)))
    options = gpu._options(["--rollouts", "1", "--kl", "0"])
    vars(options).update(prompts=2, group_size=2, max_tokens=4, micro_batch_size=2, image_side=96)
    report = gpu.run(options, "cpu", tmp_path)
    assert not report["failure"]
    (row,) = report["rollouts"]
    assert row["response_tokens"] == 2 * 2 * 4 and row["grad_norm"] > 0


def test_run_out_of_memory_is_reported_up_to_its_failure(monkeypatch, tmp_path):
    gpu = script("gpu_24gb")
    monkeypatch.setattr(gpu, "planned", lambda *_: Namespace(phases=(), size=Namespace(parameters=0)))
    monkeypatch.setattr(gpu.HostAdamW, "step", out_of_memory)
    file = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="OutOfMemoryError: no room for the step"):
        gpu.main(["--size", "tiny", "--kl", "0", "--rollouts", "1", "--output", str(file)])
    report = json.loads(file.read_text())
    assert report["phases"]["rollout"]["host_bytes"] > 0 and report["rollouts"] == []


def test_full_size_is_refused_without_a_gpu(monkeypatch):
    gpu = script("gpu_24gb")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="the full size needs a GPU; --size tiny runs on a CPU"):
        gpu.main([])


def test_benchmark_times_every_optimizer(tmp_path):
    file = tmp_path / "steps.json"
    script("host_optimizer").main(["--parameters", "1", "--rounds", "1", "--output", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows][:3] == ["a += b", "torch AdamW, fp32 weights", "float32, fp32 weights"]
    assert all(row["ns_a_parameter"] > 0 and row["of_bound"] > 0 for row in rows)
