"""``--ckpt_path last``: one command starts a run and resumes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllava_pl.cli import main
from tests.runs import CACHE

FIT = [
    "--config=tiny/colour",
    f"--model.policy.cache_dir={CACHE}",
    "--model.policy.warmup_steps=2",
    "--model.schedule.warmup_steps=0",
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


def test_same_command_starts_a_run_and_resumes_it_in_the_next_folder(caplog):
    first = main(["fit", *FIT, "--model.max_rollouts=1"])
    assert "--ckpt_path last: no checkpoint yet, starting a new run" in caplog.text
    (saved,) = Path().rglob("rollout-*.ckpt")
    (saved.parent / f".{saved.name}.tmp1").write_bytes(b"incomplete checkpoint of a killed process")
    second = main(["fit", *FIT, "--model.max_rollouts=2"])
    assert f"--ckpt_path last: {saved}" in caplog.text
    assert first.trainer.log_dir != second.trainer.log_dir
    assert (first.model.state.rollouts, second.model.state.rollouts) == (1, 2)
    assert sorted(path.name for path in Path().rglob("*.ckpt*")) == ["rollout-000001.ckpt", "rollout-000002.ckpt"]
    third = main(["test", *FIT])
    assert Path(third.trainer.ckpt_path).name == "rollout-000002.ckpt"


def test_command_test_without_checkpoint_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["test", *FIT])
    assert end.value.code == 2
    assert "error: --ckpt_path last: there is no checkpoint in " in capsys.readouterr().err


def test_only_damaged_checkpoints_are_one_line(capsys):
    folder = Path("checkpoints")
    folder.mkdir()
    (folder / "rollout-000004.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["fit", *FIT, "--trainer.callbacks.dirpath=checkpoints"])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: no checkpoint is intact: checkpoints/rollout-000004.ckpt: it cannot be read")
