"""Full disks and damaged files cost a run nothing that it had."""

from __future__ import annotations

import json
import random
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import committed_directory, draft_beside, locked, remove_leftovers
from rllava_pl.checkpoint.io import AtomicCheckpointIO, bytes_of
from tests import runs

FACTS = {"rollouts": 3, "updates": 6, "config_sha256": "c0ffee", "saved_at_ns": 5}


def checkpoint(value: float = 1.0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": {"weight": torch.full((300, 100), value), "noise": torch.rand(5000, generator=generator)},
        "loops": {"name": "fit", "batches": [1, 2]},
        manifest.FACTS: FACTS,
    }


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The checkpoints of a real run: after rollout 1 and after rollout 2."""
    directory = tmp_path_factory.mktemp("run")
    callback = RolloutCheckpoint(str(directory), every_n_rollouts=1, keep=0)
    runs.trainer(directory, callbacks=[callback]).fit(runs.module(max_rollouts=2), runs.data())
    return directory


def fit_from_the_newest(directory: Path, rollouts: int) -> tuple[RolloutCheckpoint, list[str]]:
    """Go on; what was said in warnings about checkpoints."""
    callback = RolloutCheckpoint(str(directory), every_n_rollouts=1, keep=0)
    trainer = runs.trainer(directory, callbacks=[callback])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(runs.module(max_rollouts=rollouts), runs.data(), ckpt_path=callback.newest(trainer))
    return callback, [str(warning.message) for warning in said if "damaged" in str(warning.message)]


# -- a single file -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_torch_file_that_tells_what_it_holds(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert torch.equal(loaded["state_dict"]["weight"], torch.ones(300, 100))
    found = manifest.check(path)
    assert (found.rollouts, found.updates, found.config_sha256, found.world_size) == (3, 6, "c0ffee", 1)
    assert found.versions["torch"] == torch.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_whole_checkpoint_is_never_copied_in_memory(tmp_path, monkeypatch):
    """Every tensor goes to the file by itself; the largest piece handed on is the largest tensor."""
    pieces = []
    write = manifest._HashingWriter.write
    monkeypatch.setattr(
        manifest._HashingWriter, "write", lambda self, data: pieces.append(len(data)) or write(self, data)
    )
    parts = {str(k): torch.rand(10_000) for k in range(20)}
    AtomicCheckpointIO().save_checkpoint(parts, tmp_path / "a.ckpt")
    assert max(pieces) == 40_000
    assert sum(pieces) >= 20 * 40_000


def test_a_disk_that_is_full_at_any_place_keeps_the_old_file(tmp_path):
    path, io = tmp_path / "a.ckpt", AtomicCheckpointIO()
    io.save_checkpoint(checkpoint(1.0), path)
    size = path.stat().st_size
    for k in range(20):
        with (
            files_up_to(size * k // 20),
            pytest.raises(OSError, match=r"a\.ckpt could not be written \(File too large"),
        ):
            io.save_checkpoint(checkpoint(2.0), path)
        assert torch.equal(io.load_checkpoint(path)["state_dict"]["weight"], torch.ones(300, 100))
        assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    io.save_checkpoint(checkpoint(2.0), path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["weight"], torch.full((300, 100), 2.0))


def test_too_little_space_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 7000, 7000))
    monkeypatch.setattr(torch, "save", None)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written .*: it needs 140,000 bytes, 7,000 are free"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_tensors_share_is_counted_once():
    base = torch.zeros(100)
    assert bytes_of({"a": base, "b": [base[:10], {"c": torch.zeros(5, dtype=torch.int8)}], "d": "text"}) == 405


def test_a_run_goes_on_over_a_full_disk_and_says_so_and_stops_only_at_its_end(tmp_path, caplog):
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=1, keep=1)
    module = runs.module(max_rollouts=3)
    trainer = runs.trainer(tmp_path, callbacks=[callback])
    save = trainer.save_checkpoint

    def short_of_space(path: Path) -> None:
        with files_up_to(1 << 30 if module.rollout_index == 1 else 50_000):
            save(path)

    trainer.save_checkpoint = short_of_space
    with pytest.raises(OSError, match=r"rollout-000003\.ckpt could not be written"):
        trainer.fit(module, runs.data())
    assert [r.getMessage()[:40] for r in caplog.records if "no checkpoint after" in r.getMessage()] == [
        "no checkpoint after 2 rollouts, training",
        "no checkpoint after 3 rollouts, training",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["rollout-000001.ckpt"]


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("files"),
        lambda body: body.update(files=[]),
        lambda body: body.update(files={"archive": 3}),
        lambda body: body.update(saved_at_ns="tomorrow"),
        lambda body: body.update(saved_at_ns=None),
    ],
)
def test_a_manifest_that_is_signed_and_wrong_is_damage(change):
    body = json.loads(manifest.Manifest({"archive": manifest.Content(1, "")}).dumps())
    body.pop("sha256")
    change(body)
    text = json.dumps({"sha256": manifest._digest_of_body(body)} | body)
    with pytest.raises(manifest.DamagedCheckpoint, match="its manifest lacks a field or holds a wrong one"):
        manifest.Manifest.loads(text)


def test_a_manifest_without_end_is_damage():
    with pytest.raises(manifest.DamagedCheckpoint, match="cannot be read"):
        manifest.Manifest.loads("[" * 60_000)


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(run, monkeypatch):
    older, newest = (run / f"rollout-00000{k}.ckpt" for k in (1, 2))
    read = manifest.check

    def check(path: Path) -> manifest.Manifest:
        if path == newest:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(manifest, "check", check)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert manifest.newest([older, newest]) == older


def test_the_newest_checkpoint_damaged_anywhere_is_passed_over_with_one_warning(run, tmp_path):
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
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = callback.newest(trainer)
            assert found == str(tmp_path / "a" / older.name), place
            (message,) = [str(warning.message) for warning in said]
            assert "rollout-000002.ckpt: " in message and "rollout-000001.ckpt, the newest that is whole" in message
            with pytest.raises(manifest.DamagedCheckpoint, match=r"rollout-000002\.ckpt is damaged"):
                AtomicCheckpointIO().load_checkpoint(target)


def test_a_run_goes_on_from_the_older_checkpoint_and_repairs_the_newer(run, tmp_path):
    for path in run.glob("rollout-*.ckpt"):
        shutil.copy(path, tmp_path)
    newest = tmp_path / "rollout-000002.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    callback, said = fit_from_the_newest(tmp_path, rollouts=2)
    assert len(said) == 1
    assert manifest.check(newest).rollouts == 2
    assert callback.newest(runs.trainer(tmp_path)) == str(newest)


def test_nothing_whole_is_an_error_and_nothing_at_all_a_new_beginning(run, tmp_path):
    callback, trainer = RolloutCheckpoint(str(tmp_path)), runs.trainer(tmp_path)
    assert callback.newest(trainer) is None
    (tmp_path / "rollout-000001.ckpt").write_bytes(b"PK")
    with pytest.raises(manifest.DamagedCheckpoint, match=r"no checkpoint is whole: .*1\.ckpt: it cannot be read"):
        callback.newest(trainer)


def test_the_newest_is_the_one_saved_last_not_the_one_with_the_largest_number(tmp_path):
    for rollouts, saved_at in ((300, 1), (10, 2)):
        facts = {"rollouts": rollouts, "saved_at_ns": saved_at}
        AtomicCheckpointIO().save_checkpoint({manifest.FACTS: facts}, tmp_path / f"rollout-{rollouts:06d}.ckpt")
    callback = RolloutCheckpoint(str(tmp_path), keep=1)
    assert callback.newest(runs.trainer(tmp_path)).endswith("rollout-000010.ckpt")
    callback._prune(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rollout-000010.ckpt"]


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(run, tmp_path):
    shutil.copy(run / "rollout-000001.ckpt", tmp_path)
    (tmp_path / "rollout-000002.ckpt").write_bytes((run / "rollout-000002.ckpt").read_bytes()[:-9])
    RolloutCheckpoint(str(tmp_path), keep=1)._prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rollout-000001.ckpt", "rollout-000002.ckpt"}


def test_lightnings_own_checkpoints_have_a_manifest_too(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=1)
    trainer = runs.trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert manifest.check(tmp_path / "last.ckpt").rollouts == 1
    trainer = runs.trainer(tmp_path, limit_test_batches=1)
    trainer.test(runs.module(), runs.data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert "test/reward" in trainer.callback_metrics


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.ckpt"
    for value in (b"old", b"new"):
        with committed_directory(target, FACTS) as draft:
            (draft / "part").mkdir()
            (draft / "part" / "0.bin").write_bytes(value * 1000)
    assert manifest.check(target).rollouts == 3
    for k in range(20):
        with pytest.raises(OSError, match="File too large"), committed_directory(target) as draft, files_up_to(200 * k):
            (draft / "0.bin").write_bytes(b"x" * 4000)
    assert (target / "part" / "0.bin").read_bytes() == b"new" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "0.bin").write_bytes(b"abd"), r"0\.bin was changed"),
        (lambda d: (d / "0.bin").write_bytes(b"ab"), r"0\.bin has 2 bytes, the manifest says 3"),
        (lambda d: (d / "0.bin").unlink(), r"0\.bin has None bytes, the manifest says 3"),
        (lambda d: (d / "1.bin").write_bytes(b"abc"), r"1\.bin has 3 bytes, the manifest says None"),
        (lambda d: (d / "manifest.json").unlink(), "it has no manifest"),
        (lambda d: (d / "manifest.json").write_text("{}"), "its manifest cannot be read"),
    ],
)
def test_a_damaged_directory_is_found_out(tmp_path, damage, message):
    with committed_directory(tmp_path / "a.ckpt") as draft:
        (draft / "0.bin").write_bytes(b"abc")
    damage(tmp_path / "a.ckpt")
    with pytest.raises(manifest.DamagedCheckpoint, match=message):
        manifest.check(tmp_path / "a.ckpt")


def test_a_manifest_that_was_edited_is_not_believed(tmp_path):
    text = manifest.Manifest({}, rollouts=3).dumps()
    assert manifest.Manifest.loads(text).rollouts == 3
    with pytest.raises(manifest.DamagedCheckpoint, match="was changed"):
        manifest.Manifest.loads(text.replace('"rollouts": 3', '"rollouts": 4'))


def test_leftovers_of_the_dead_go_and_drafts_of_the_living_stay(tmp_path):
    dead, living, foreign = (draft_beside(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "notes.txt"))
    torn = draft_beside(tmp_path / "c.ckpt", "old")  # killed between the two renames of a directory
    for path in (dead, living, foreign, torn):
        path.write_text(path.name)
    with locked(living):
        remove_leftovers(tmp_path, r".+\.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {living.name, foreign.name, "c.ckpt"}
