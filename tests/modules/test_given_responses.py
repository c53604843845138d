"""Responses of a data set are checked before training, not at the rollout that needs one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rllava_pl.datamodules import PromptDataModule
from rllava_pl.loop.options import Batching
from rllava_pl.modules import DPO, LUFFY, SFT, PolicyModule
from tests import runs

RIGHT = "<answer>red</answer>"


def data(folder: Path, targets: list[str], **more: str) -> PromptDataModule:
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    rows = [
        {"prompt": "<image>What color is the shape?", "images": "a.png", "answer": "red", "target": target} | more
        for target in targets
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return PromptDataModule(train=str(folder / "rows.jsonl"), batch_size=4)


def fit(folder: Path, algorithm: type[PolicyModule], data: PromptDataModule) -> PolicyModule:
    module = runs.module(algorithm, max_rollouts=1, batching=Batching())
    runs.trainer(folder).fit(module, data)
    return module


@pytest.mark.parametrize("algorithm", [SFT, LUFFY])
def test_target_longer_than_the_budget_is_refused_by_its_row(tmp_path, algorithm):
    with pytest.raises(ValueError, match=r"target of .*rows\.jsonl row 5: it has \d+ tokens, sampling\.max_tokens is"):
        fit(tmp_path, algorithm, data(tmp_path, [RIGHT] * 5 + [RIGHT * 20]))


@pytest.mark.parametrize(("algorithm", "field"), [(SFT, "target"), (DPO, "rejected")])
def test_missing_response_is_refused_where_each_is_needed(tmp_path, algorithm, field):
    rows = data(tmp_path, [RIGHT] * 4 + ([""] if field == "target" else [RIGHT]))
    message = rf"learns from the {field} of every row, and \d of 5 have none, .* data\.require_{field}: true"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, algorithm, rows)


def test_data_without_any_target_trains_on_rewards_with_a_warning(tmp_path, caplog):
    assert fit(tmp_path, LUFFY, data(tmp_path, [""] * 4)).state.rollouts == 1
    assert "no row has a target: LUFFY learns from rewards alone" in caplog.text


def test_pairs_from_files_train(tmp_path):
    pairs = data(tmp_path, [RIGHT] * 4, rejected="<answer>blue</answer>")
    assert fit(tmp_path, DPO, pairs).state.updates == 1
