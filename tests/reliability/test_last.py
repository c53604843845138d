"""``--ckpt_path last``: one command for the first start of a run and for every one after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllava_pl.cli import main
from tests.runs import CACHE

FIT = [
    "--config=tiny/colour",
    f"--model.policy.cache_dir={CACHE}",
    "--model.policy.warmup_steps=2",
    "--model.warmup_steps=0",
    "--model.group_size=2",
    "--data.batch_size=4",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.callbacks+=RolloutCheckpoint",
    "--ckpt_path=last",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLLAVA_PL_DEBUG", raising=False)


def test_the_same_command_starts_a_run_and_goes_on_with_it_over_numbered_folders(caplog):
    first = main(["fit", *FIT, "--model.max_rollouts=1"])
    assert "--ckpt_path last: no checkpoint yet, starting anew" in caplog.text
    (saved,) = Path().rglob("rollout-*.ckpt")
    (saved.parent / f".{saved.name}.tmp1").write_bytes(b"half a checkpoint of a process that was killed")
    second = main(["fit", *FIT, "--model.max_rollouts=2"])
    assert f"--ckpt_path last: {saved}" in caplog.text
    assert first.trainer.log_dir != second.trainer.log_dir
    assert (first.model.rollout_index, second.model.rollout_index) == (1, 2)
    assert sorted(path.name for path in Path().rglob("*.ckpt*")) == ["rollout-000001.ckpt", "rollout-000002.ckpt"]
    third = main(["test", *FIT])
    assert Path(third.trainer.ckpt_path).name == "rollout-000002.ckpt"


def test_a_test_needs_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as end:
        main(["test", *FIT])
    assert end.value.code == 2
    assert "error: --ckpt_path last: there is no checkpoint in " in capsys.readouterr().err


def test_damage_to_all_of_them_is_told_in_one_line(capsys):
    folder = Path("checkpoints")
    folder.mkdir()
    (folder / "rollout-000004.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["fit", *FIT, "--trainer.callbacks.dirpath=checkpoints"])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: no checkpoint is whole: checkpoints/rollout-000004.ckpt: it cannot be read")
