"""``python -m rllava_pl plan``: from a config to a verdict."""

from __future__ import annotations

import json

import pytest

from rllava_pl.cli import configs, main
from rllava_pl.cli.plan import PlanCLI, _limits, _parser, _settings
from rllava_pl.memory import Limits, advise, largest_cache, largest_micro_batch, plan
from rllava_pl.memory.advice import changes
from rllava_pl.memory.plan import Steps, planned
from rllava_pl.memory.settings import Engine, Prompts, Settings, Source
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


def test_a_run_that_fits_is_told_so(capsys):
    main([*TINY, "--ram", "1GiB"])
    shown = capsys.readouterr().out
    assert "fits: 0.0" in shown and "DOES NOT FIT" not in shown
    assert all(phase in shown for phase in ("load", "rollout", "reference", "update", "optimizer", "save"))


def test_a_run_that_does_not_fit_ends_with_1_and_advice(capsys):
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--ram", "15MiB", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and report["fits"] is False
    assert report["largest"]["host_bytes"] > report["limits"]["host_bytes"] == 15 * 2**20
    options = {item["option"].partition(":")[0] for item in report["advice"]}
    assert {"model.policy.gradient_checkpointing", "model.micro_batch_size"} <= options
    assert report["largest_micro_batch_size"] < report["micro_batch_size"] == 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ram", "much"], "'much' is no size"),
        (["--ram", "1GB", "--ranks", "3", "--machines", "2"], "--ranks 3 cannot be spread evenly over --machines 2"),
        (["--ram", "1GB", "--trainer.strategy", "fsdp"], "no memory plan for the strategy 'fsdp'"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main([*TINY, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


STEPS = Steps(streamed=3 * GIB, kept=9 * GIB, scoring=GIB, prefill=GIB)
SETTINGS = Settings(
    Source("qwen3_vl_4b", dtype="bfloat16"), engine=Engine("vllm", "release_kv", kv_bytes=4 * GIB), max_tokens=512
)


def test_room_for_the_cache_is_what_the_rollout_leaves():
    found = planned(SETTINGS, STEPS)
    limits = Limits(gpu=80 * GIB, host=64 * GIB)
    room = largest_cache(found, limits)
    assert room - 4 * GIB == limits.gpu - found["rollout"].gpu
    assert largest_cache(found, Limits(found["rollout"].gpu - 4 * GIB, limits.host)) == 0
    assert largest_cache(planned(SETTINGS.replace(engine=Engine("server")), STEPS), limits) == 0


def test_every_change_changes_one_thing_and_none_is_offered_twice():
    options = [option for option, _ in changes(SETTINGS)]
    assert len(set(options)) == len(options)
    assert all(settings != SETTINGS for _, settings in changes(SETTINGS))
    assert "model.policy.lora: {r: 16}" in options and "VLLMRollout.memory: sleep" in options
    recomputed = SETTINGS.with_source(gradient_checkpointing=True)
    assert not any("gradient_checkpointing" in option for option, _ in changes(recomputed))
    assert any("rl_fsdp2" in option for option, _ in changes(SETTINGS.replace(ranks=4)))


@pytest.mark.slow
def test_advice_puts_first_what_is_enough(tiny_settings):
    found = plan(tiny_settings)
    limits = Limits(0, round(0.7 * found.host))
    advice = advise(found, limits)
    assert advice and advice[0].fits and advice[0].host > 0
    assert [item.fits for item in advice] == sorted((item.fits for item in advice), reverse=True)


def test_the_largest_micro_batch_is_the_last_whose_own_plan_fits(tiny_settings):
    found = plan(tiny_settings)
    limits = Limits(0, round(0.6 * found.host))
    rows = largest_micro_batch(found, limits)
    assert 0 < rows < tiny_settings.micro_rows
    assert plan(tiny_settings.replace(micro_batch_size=rows)).fits(limits)
    assert not plan(tiny_settings.replace(micro_batch_size=2 * rows)).fits(limits)


@pytest.fixture(scope="module")
def tiny_settings(tmp_path_factory) -> Settings:
    """A tiny model and batches large enough to matter."""
    from rllava_pl.models import tiny

    path = tiny.build(tmp_path_factory.mktemp("model") / "m", questions=["a"], answers=["b"], warmup_steps=0)
    prompts = Prompts(tokens=64, images=1, image_tokens=4)
    return Settings(Source(str(path)), group=4, max_tokens=64, batch_prompts=8, prompts=prompts, device="cpu")


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_shipped_overlay_fits_what_it_is_named_after(tmp_path, name):
    """With 5 GiB for activations in place of a trace; traced, the 4B takes 2.8."""
    (tmp_path / "base.yaml").write_text(BASE)
    gpu, ram, ranks = OVERLAYS[name]
    layers = ["--config", str(tmp_path / "base.yaml"), "--config", configs.find(f"models/{name}")]
    options, rest = _parser().parse_known_args([*layers, "--gpu", gpu, "--ram", ram, "--ranks", str(ranks)])
    cli = PlanCLI(rest)
    steps = Steps(streamed=5 * GIB, kept=5 * GIB, scoring=GIB, prefill=GIB)
    found = planned(_settings(cli, options), steps, cli.model.optimizer)
    assert found.fits(_limits(options))
    assert (found.shapes.trained == found.shapes.parameters) is ("8b_24gb" not in name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_4b_fits_24_gib_in_every_phase(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(BASE)
    layers = ["--config", str(tmp_path / "base.yaml"), "--config", "models/qwen3_vl_4b_24gb"]
    main(["plan", *layers, "--gpu", "24GiB", "--ram", "64GB", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True and report["parameters"] == report["trained_parameters"] == 4_437_815_808
    assert max(phase["gpu_bytes"] for phase in report["phases"].values()) < 23 * GIB
    assert report["largest_micro_batch_size"] >= report["micro_batch_size"] == 4


def test_every_overlay_of_a_model_is_checked():
    assert {name.removeprefix("models/") for name in configs.names() if name.startswith("models/")} == set(OVERLAYS)
