"""The summary has the numbers of the run and leaves out what was not measured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from rllava_pl.callbacks import RunSummary
from rllava_pl.callbacks.splits import batches, split_loaders
from rllava_pl.callbacks.summary import next_commands, peak_rss_gb, process_seconds
from rllava_pl.datamodules import PromptDataModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import PromptBatch, Rollout, Score
from tests import runs
from tests.callbacks.conftest import Run


class Brevity(BaseReward):
    """A reward without accuracy."""

    def score(self, rollout: Rollout) -> Score:
        return Score(1.0 / (1 + len(rollout.response_ids)))


def record(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text("utf-8"))


def test_scores_equal_a_test_before_and_after(run: Run, tmp_path: Path) -> None:
    (after,) = runs.trainer(tmp_path).test(run.module, runs.data(), verbose=False)
    untrained = runs.module()
    (before,) = runs.trainer(tmp_path).test(untrained, runs.data(), verbose=False)
    written = record(run.folder)
    assert written["accuracy_before"] == pytest.approx(before["test/accuracy"])
    assert written["accuracy_after"] == pytest.approx(after["test/accuracy"])
    assert written["reward_after"] == pytest.approx(after["test/reward"])
    assert {f"test/{name}": value for name, value in written["test_after"].items()} == pytest.approx(after)


def test_the_record_has_counts_versions_and_options(run: Run) -> None:
    written = record(run.folder)
    assert (written["rollouts"], written["updates"]) == (4, 8)  # two mini-batches a rollout
    assert written["versions"].keys() == {"python", "torch", "transformers", "lightning", "rllava_pl"}
    assert 0 < written["seconds"] <= process_seconds()
    assert written["config"]["algorithm"] == "GRPO"
    assert written["config"]["rewards"] == ["AnswerTagReward"]
    assert written["config"]["sampling"]["max_tokens"] == 6
    assert written["config"]["model"]["batching"]["num_minibatches"] == 2
    assert written["config"]["trainer"]["ranks"] == 1


def test_paths_include_files_written_at_the_end(run: Run) -> None:
    assert record(run.folder)["paths"] == {
        "folder": str(run.folder),
        "table": str(run.folder / "rollouts.html"),
        "export": str(run.folder / "hf"),
        "checkpoint": str(run.folder / "checkpoints/rollout-000004.ckpt"),
    }


def test_the_panel_is_short_and_followed_by_commands(run: Run) -> None:
    written, panel = record(run.folder), run.output.partition("GRPO is done")[2]
    before, after = written["accuracy_before"], written["accuracy_after"]
    assert f"test accuracy  {before:.3f} → {after:.3f} ({after - before:+.3f})" in panel
    assert "4, 8 updates" in panel
    assert f"curves: tensorboard --logdir {run.folder}\n" in panel
    assert len(panel.splitlines()) <= 15


def test_a_resumed_run_keeps_the_accuracy_before(run: Run, resumed: Run) -> None:
    assert record(resumed.folder)["test_before"] == record(run.folder)["test_before"]
    assert record(resumed.folder)["test_after"] == record(run.folder)["test_after"]


def test_without_a_data_module_no_test_scores_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.data()
    data.setup("fit")
    loader = DataLoader(list(data.train_prompts), 4, collate_fn=PromptBatch)
    runs.trainer(tmp_path, callbacks=[RunSummary()]).fit(runs.module(max_rollouts=1), loader)
    written = record(tmp_path)
    assert written["accuracy_before"] is written["accuracy_after"] is written["reward_after"] is None
    assert written["test_before"] == written["test_after"] == {}
    printed = capsys.readouterr().out
    assert "1, 2 updates" in printed
    assert "test" not in printed.partition("GRPO is done")[2].replace(str(tmp_path), "").replace("pytest", "")


def test_without_accuracy_only_the_reward_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runs.module(max_rollouts=1, rewards=[Brevity()])
    runs.trainer(tmp_path, callbacks=[RunSummary()]).fit(module, runs.data())
    written = record(tmp_path)
    assert written["accuracy_before"] is written["accuracy_after"] is None
    assert 0 < written["reward_before"] < 1
    printed = capsys.readouterr().out
    assert "test reward" in printed and "test accuracy" not in printed


def test_limit_test_batches_of_zero_skips_the_test(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, callbacks=[RunSummary()], limit_test_batches=0)
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert record(tmp_path)["test_after"] == {}


def test_limits_are_numbers_or_fractions_of_batches() -> None:
    loaders = split_loaders(runs.data(test_size=8, val_batch_size=2), "test")
    assert [len(list(batches(loaders, limit))) for limit in (1.0, 0.5, 3, 100, 0)] == [4, 2, 3, 4, 0]


def test_missing_splits_have_no_loaders() -> None:
    assert split_loaders(None, "test") == []
    assert split_loaders(runs.data(test_size=0), "test") == []
    assert split_loaders(PromptDataModule(train="train.jsonl"), "test") == []


def test_seconds_count_from_the_start_of_the_process() -> None:
    psutil = pytest.importorskip("psutil")
    assert process_seconds() == pytest.approx(time.time() - psutil.Process().create_time(), abs=2.0)


def test_peak_memory_is_in_gigabytes() -> None:
    psutil = pytest.importorskip("psutil")
    assert peak_rss_gb() == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=1.0)


def test_commands_without_their_files_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    assert next_commands({"folder": str(folder)}) == {}
    given = {"folder": str(folder), "config": str(folder / "config.yaml"), "checkpoint": str(folder / "x.ckpt")}
    assert next_commands(given) == {
        "test again": f"python -m rllava_pl test --config '{folder}/config.yaml' --ckpt_path '{folder}/x.ckpt'"
    }
