"""A run on full disks and with damaged files resumes the newest intact checkpoint and loses nothing else."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.io import AtomicCheckpointIO
from tests import runs
from tests.checkpoint.disks import files_up_to


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The checkpoints of a real run: after rollout 1 and after rollout 2."""
    directory = tmp_path_factory.mktemp("run")
    callback = RolloutCheckpoint(str(directory), every_n_rollouts=1, keep=0)
    runs.trainer(directory, callbacks=[callback]).fit(runs.module(max_rollouts=2), runs.data())
    return directory


def resume_newest(directory: Path, rollouts: int) -> tuple[RolloutCheckpoint, list[str]]:
    """Resume; returns warnings about damaged checkpoints."""
    callback = RolloutCheckpoint(str(directory), every_n_rollouts=1, keep=0)
    trainer = runs.trainer(directory, callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(runs.module(max_rollouts=rollouts), runs.data(), ckpt_path=callback.newest(trainer))
    return callback, [str(warning.message) for warning in caught if "damaged" in str(warning.message)]


def test_full_disk_is_a_warning_during_the_run_and_an_error_at_its_end(tmp_path, caplog):
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=1, keep=1)
    module = runs.module(max_rollouts=3)
    trainer = runs.trainer(tmp_path, callbacks=[callback])
    save = trainer.save_checkpoint

    def short_of_space(path: Path) -> None:
        with files_up_to(1 << 30 if module.state.rollouts == 1 else 50_000):
            save(path)

    trainer.save_checkpoint = short_of_space
    with pytest.raises(OSError, match=r"rollout-000003\.ckpt could not be written"):
        trainer.fit(module, runs.data())
    assert [r.getMessage()[:40] for r in caplog.records if "no checkpoint after" in r.getMessage()] == [
        "no checkpoint after 2 rollouts, training",
        "no checkpoint after 3 rollouts, training",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["rollout-000001.ckpt"]


def test_unreadable_checkpoint_is_skipped(run, monkeypatch):
    older, newest = (run / f"rollout-00000{k}.ckpt" for k in (1, 2))
    read = manifest.check

    def check(path: Path) -> manifest.Manifest:
        if path == newest:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(manifest, "check", check)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert manifest.newest([older, newest]) == older


def test_newest_checkpoint_damaged_anywhere_is_skipped_with_one_warning(run, tmp_path):
    """Cut off at 50 places and one bit flipped at 50, first and last bytes and the manifest among them."""
    older, newest = (run / f"rollout-00000{k}.ckpt" for k in (1, 2))
    whole, draw = newest.read_bytes(), random.Random(0)
    edges = [0, 1, len(whole) - 1, len(whole) - 40, whole.rindex(b'"rollouts"') + 12]
    places = edges + [draw.randrange(len(whole)) for _ in range(45)]
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        shutil.copy(older, directory)
    callback, trainer = RolloutCheckpoint(str(tmp_path / "a")), runs.trainer(tmp_path)
    target = tmp_path / "a" / newest.name
    for place in places:
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        for content in (whole[:place], flipped):
            target.write_bytes(content)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = callback.newest(trainer)
            assert found == str(tmp_path / "a" / older.name), place
            (message,) = [str(warning.message) for warning in caught]
            assert "rollout-000002.ckpt: " in message and "rollout-000001.ckpt, the newest intact checkpoint" in message
            with pytest.raises(manifest.DamagedCheckpoint, match=r"rollout-000002\.ckpt is damaged"):
                AtomicCheckpointIO().load_checkpoint(target)


def test_run_resumes_the_older_checkpoint_and_replaces_the_damaged_one(run, tmp_path):
    for path in run.glob("rollout-*.ckpt"):
        shutil.copy(path, tmp_path)
    newest = tmp_path / "rollout-000002.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    callback, damaged = resume_newest(tmp_path, rollouts=2)
    assert len(damaged) == 1
    assert manifest.check(newest).rollouts == 2
    assert callback.newest(runs.trainer(tmp_path)) == str(newest)


def test_only_damaged_checkpoints_are_an_error_and_none_are_a_new_run(run, tmp_path):
    callback, trainer = RolloutCheckpoint(str(tmp_path)), runs.trainer(tmp_path)
    assert callback.newest(trainer) is None
    (tmp_path / "rollout-000001.ckpt").write_bytes(b"PK")
    with pytest.raises(manifest.DamagedCheckpoint, match=r"no checkpoint is intact: .*1\.ckpt: it cannot be read"):
        callback.newest(trainer)


def test_newest_checkpoint_is_the_one_saved_last_not_the_one_with_the_largest_number(tmp_path):
    for rollouts, saved_at in ((300, 1), (10, 2)):
        facts = {"rollouts": rollouts, "saved_at_ns": saved_at}
        AtomicCheckpointIO().save_checkpoint({manifest.FACTS: facts}, tmp_path / f"rollout-{rollouts:06d}.ckpt")
    callback = RolloutCheckpoint(str(tmp_path), keep=2)
    trainer = runs.trainer(tmp_path, callbacks=[callback])
    assert callback.newest(trainer).endswith("rollout-000010.ckpt")
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"rollout-000001.ckpt", "rollout-000010.ckpt"}


def test_damaged_checkpoint_never_replaces_an_intact_one(run, tmp_path):
    shutil.copy(run / "rollout-000001.ckpt", tmp_path / "rollout-000003.ckpt")
    (tmp_path / "rollout-000002.ckpt").write_bytes((run / "rollout-000002.ckpt").read_bytes()[:-9])
    trainer = runs.trainer(tmp_path, callbacks=[RolloutCheckpoint(str(tmp_path), keep=2)])
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"rollout-00000{k}.ckpt" for k in (1, 2, 3)}


def test_checkpoints_of_lightning_have_a_manifest(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=1)
    trainer = runs.trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert manifest.check(tmp_path / "last.ckpt").rollouts == 1
    trainer = runs.trainer(tmp_path, limit_test_batches=1)
    trainer.test(runs.module(), runs.data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert "test/reward" in trainer.callback_metrics
