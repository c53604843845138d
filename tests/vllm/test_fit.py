"""Whole runs with the callback: from the command line, resumed, tested afterwards in the same process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rllava_pl.callbacks import RolloutCheckpoint, VLLMRollout
from rllava_pl.cli import main
from rllava_pl.rollout.vllm_build import build_llm
from tests import runs
from tests.runs import CACHE

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]


def vllm(**options: object) -> VLLMRollout:
    return VLLMRollout(**({"context_tokens": 512, "kv_cache_gib": 1 / 16, "sync_check_every": 1} | options))


def test_overlay_trains_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    cli = main(
        [
            *("fit", "--config", "quickstart", "--config", "engines/vllm"),
            *("--model.policy.cache_dir", str(CACHE), "--trainer.default_root_dir", str(tmp_path)),
            *(
                "--model.max_rollouts=2",
                "--data.batch_size=8",
                "--trainer.logger=false",
                "--model.schedule.warmup_steps=1",
            ),
        ]
    )
    metrics = cli.trainer.callback_metrics
    assert [type(x).__name__ for x in cli.trainer.callbacks].count("VLLMRollout") == 1
    assert "TransformersRollout" not in {type(x).__name__ for x in cli.trainer.callbacks}
    assert 0 < metrics["train/engine_gap_max"] <= 1e-4 and metrics["train/engine_gap_mean"] <= 1e-5
    assert (tmp_path / "summary.json").is_file()
    assert torch.distributed.is_initialized() is False  # vLLM's group went with its engine


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Samples depend on counters alone, not on the engine, which is built again."""

    def fit(folder: str, rollouts: int, checkpoint: str | None = None) -> torch.nn.Module:
        module = runs.module(max_rollouts=rollouts, policy=runs.tiny())
        root = tmp_path / folder
        saver = RolloutCheckpoint(dirpath=str(root), every_n_rollouts=2)
        trainer = runs.trainer(root, callbacks=[vllm(), saver], enable_checkpointing=True)
        trainer.fit(module, runs.data(), ckpt_path=checkpoint, weights_only=True)
        if checkpoint:
            scores = trainer.test(module, runs.data(), verbose=False)
            assert 0 <= scores[0]["test/reward"] <= 1
        return module.policy

    whole = fit("whole", 4)
    fit("half", 2)
    (saved,) = [p for p in (tmp_path / "half").rglob("*.ckpt") if "last" not in p.name][:1]
    resumed = fit("half", 4, str(saved))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)


def test_engine_computes_in_the_trainers_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    monkeypatch.setattr(
        "rllava_pl.callbacks.vllm.build_llm",
        lambda *args, **options: dtypes.append(options["dtype"]) or build_llm(*args, **options),
    )
    trainer = runs.trainer(tmp_path, callbacks=[vllm()], precision="bf16-mixed")
    trainer.fit(runs.module(max_rollouts=2), runs.data())
    assert dtypes == ["bfloat16"]
    assert 0 < trainer.callback_metrics["train/engine_gap_max"] < 0.05
