"""Predictions are JSON lines, one per row of the split, in order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lightning.pytorch import Callback

from rllava_pl.callbacks import RolloutWriter
from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.modules import PolicyModule
from rllava_pl.types import Rollout
from tests import runs
from tests.callbacks.conftest import Run


class Keep(Callback):
    """All rollouts of ``predict``."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.rollouts += outputs


def predict(root: Path, module: PolicyModule, data: SyntheticVisionDataModule, *callbacks: Callback) -> list[Rollout]:
    keep = Keep()
    runs.trainer(root, callbacks=[keep, *callbacks]).predict(module, data, return_predictions=False)
    return keep.rollouts


def test_predict_writes_one_line_per_row(run: Run, tmp_path: Path) -> None:
    rollouts = predict(tmp_path, run.module, runs.data(test_size=5, val_batch_size=2), RolloutWriter())
    text = (tmp_path / "predictions.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "uid": f"color-test:{row}",
            "text": rollout.text,
            "answer": rollout.prompt.answer,
            "finish_reason": rollout.finish_reason,
            "response_tokens": len(rollout.response_ids),
        }
        for row, rollout in enumerate(rollouts)
    ]
    assert len(rollouts) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_any_text_is_preserved_and_an_older_file_replaced(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    path.parent.mkdir()
    path.write_text("old")
    (answered,) = predict(tmp_path, run.module, runs.data(test_size=1))
    writer, odd = RolloutWriter(str(path)), 'line\nbreak "quoted" \u2028 \ud800 \u4e2d'
    writer.on_predict_start(run.trainer, run.module)
    writer.on_predict_batch_end(run.trainer, run.module, [dataclasses.replace(answered, text=odd)], None, 0)
    writer.on_predict_end(run.trainer, run.module)
    (line,) = path.read_text("utf-8").rstrip("\n").split("\n")
    assert json.loads(line)["text"] == odd
    assert "\u4e2d" in line  # readable where it can be
