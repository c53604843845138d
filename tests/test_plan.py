"""``python -m rllava_pl plan``: from a config to a verdict."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from rllava_pl.cli import configs, main
from rllava_pl.cli.plan import PlanCLI, limits_of, settings_of_config
from rllava_pl.memory import (
    MemoryLimits,
    MemoryPlan,
    PlannedEngine,
    PlannedModel,
    PlanSettings,
    PromptSize,
    advise,
    largest_kv_cache,
    largest_micro_batch,
    plan,
)
from rllava_pl.memory.advice import changes
from rllava_pl.memory.micro_step import StepBytes
from tests.runs import CACHE

GIB = 2**30
TINY = [
    "plan",
    "--config",
    "tiny/colour",
    f"--model.policy.cache_dir={CACHE}",
    "--prompt_tokens",
    "32",
    "--image_tokens=4",
]
BASE = """
model:
  class_path: GRPO
  init_args:
    policy: {class_path: VLM, init_args: {path: qwen3_vl_4b}}
    rewards: [AnswerTagReward]
data: {class_path: SyntheticVisionDataModule, init_args: {task: color, batch_size: 32}}
trainer: {callbacks: [RolloutProgressBar]}
"""
OVERLAYS = {
    "qwen2_5_vl_3b_24gb": ("24GiB", "64GB", 1),
    "qwen3_vl_4b_24gb": ("24GiB", "64GB", 1),
    "qwen3_vl_8b_24gb": ("24GiB", "32GB", 1),
    "qwen3_vl_4b_4x24gb_zero3": ("24GiB", "128GB", 4),
    "qwen3_vl_8b_4x80gb_fsdp2": ("80GB", "256GB", 4),
}


def test_run_that_fits_exits_with_0(capsys):
    main([*TINY, "--ram", "1GiB"])
    shown = capsys.readouterr().out
    assert "fits: 0.0" in shown and "DOES NOT FIT" not in shown
    assert all(phase in shown for phase in ("load", "rollout", "logprobs", "update", "optimizer", "save"))


def test_run_that_does_not_fit_exits_with_1_and_advice(capsys):
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--ram", "15MiB", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and report["fits"] is False
    assert report["largest"]["host_bytes"] > report["limits"]["host_bytes"] == 15 * 2**20
    options = {item["option"].partition(":")[0] for item in report["advice"]}
    assert {"model.policy.gradient_checkpointing", "model.batching.micro_batch_size"} <= options
    assert report["largest_micro_batch_size"] < report["micro_batch_size"] == 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ram", "much"], "'much' is not a size"),
        (["--ram", "1GB", "--ranks", "3", "--machines", "2"], "--ranks 3 cannot be spread evenly over --machines 2"),
        (["--ram", "1GB", "--trainer.strategy", "fsdp"], "no memory plan for the strategy 'fsdp'"),
    ],
)
def test_run_that_cannot_be_planned_gives_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main([*TINY, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


STEP = StepBytes(update=3 * GIB, update_with_gradients=9 * GIB, logprobs=GIB)
SETTINGS = PlanSettings(
    PlannedModel("qwen3_vl_4b", dtype="bfloat16"),
    engine=PlannedEngine("vllm", "release_kv", kv_bytes=4 * GIB),
    max_tokens=512,
)


def planned(settings: PlanSettings) -> MemoryPlan:
    """The plan with given bytes of a micro-step in place of traced ones."""
    return plan(settings, step=STEP, prefill_bytes=GIB)


def test_largest_kv_cache_is_what_the_rollout_leaves():
    found = planned(SETTINGS)
    limits = MemoryLimits(gpu=80 * GIB, host=64 * GIB)
    cache = largest_kv_cache(found, limits)
    assert cache - 4 * GIB == limits.gpu - found["rollout"].gpu
    assert largest_kv_cache(found, MemoryLimits(found["rollout"].gpu - 4 * GIB, limits.host)) == 0
    assert largest_kv_cache(planned(SETTINGS.replace(engine=PlannedEngine("server"))), limits) == 0


def test_every_change_is_a_different_option():
    options = [option for option, _ in changes(SETTINGS)]
    assert len(set(options)) == len(options)
    assert all(settings != SETTINGS for _, settings in changes(SETTINGS))
    assert "model.policy.lora: {r: 16}" in options and "VLLMRollout.memory: sleep" in options
    recomputed = SETTINGS.with_model(gradient_checkpointing=True)
    assert not any("gradient_checkpointing" in option for option, _ in changes(recomputed))
    assert any("rl_fsdp2" in option for option, _ in changes(SETTINGS.replace(ranks=4)))


@pytest.mark.slow
def test_advice_begins_with_changes_that_are_enough(tiny_settings):
    found = plan(tiny_settings)
    limits = MemoryLimits(0, round(0.7 * found.host))
    advice = advise(found, limits)
    assert advice and advice[0].fits and advice[0].host > 0
    assert [item.fits for item in advice] == sorted((item.fits for item in advice), reverse=True)


def test_largest_micro_batch_is_the_largest_whose_plan_fits(tiny_settings):
    found = plan(tiny_settings)
    limits = MemoryLimits(0, round(0.6 * found.host))
    rows = largest_micro_batch(found, limits)
    assert 0 < rows < tiny_settings.micro_batch_rows
    assert plan(tiny_settings.replace(micro_batch_size=rows)).fits(limits)
    assert not plan(tiny_settings.replace(micro_batch_size=2 * rows)).fits(limits)


@pytest.fixture(scope="module")
def tiny_settings(tmp_path_factory) -> PlanSettings:
    """A tiny model and batches large enough to matter."""
    from rllava_pl.models import tiny

    path = tiny.build(tmp_path_factory.mktemp("model") / "m", questions=["a"], answers=["b"], warmup_steps=0)
    prompt = PromptSize(tokens=64, images=1, image_tokens=4)
    return PlanSettings(
        PlannedModel(str(path)), group_rows=4, max_tokens=64, batch_prompts=8, prompt=prompt, device="cpu"
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_shipped_overlay_fits_the_machine_in_its_name(tmp_path, name):
    """With 5 GiB of activations in place of a trace; traced, the 4B takes 2.8."""
    (tmp_path / "base.yaml").write_text(BASE)
    gpu, ram, ranks = OVERLAYS[name]
    layers = ["--config", str(tmp_path / "base.yaml"), "--config", configs.find(f"models/{name}")]
    options = Namespace(gpu=gpu, ram=ram, ranks=ranks, machines=1, prompt_tokens=None, images=1, image_tokens=256)
    cli = PlanCLI(layers)
    step = StepBytes(update=5 * GIB, update_with_gradients=5 * GIB, logprobs=GIB)
    found = plan(settings_of_config(cli, options), cli.model.optimizer, step=step, prefill_bytes=GIB)
    assert found.fits(limits_of(options))
    assert (found.size.trained == found.size.parameters) is ("8b_24gb" not in name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_4b_fits_24_gib_in_every_phase(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(BASE)
    layers = ["--config", str(tmp_path / "base.yaml"), "--config", "models/qwen3_vl_4b_24gb"]
    main(["plan", *layers, "--gpu", "24GiB", "--ram", "64GB", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True and report["parameters"] == report["trained_parameters"] == 4_437_815_808
    assert max(phase["gpu_bytes"] for phase in report["phases"].values()) < 23 * GIB
    assert report["largest_micro_batch_size"] >= report["micro_batch_size"] == 4


def test_every_overlay_of_a_model_is_planned():
    assert {name.removeprefix("models/") for name in configs.names() if name.startswith("models/")} == set(OVERLAYS)
