"""Checkpoints in one file: readable by torch, streamed, and replaced in one step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.io import AtomicCheckpointIO, bytes_of
from tests.checkpoint.disks import checkpoint, files_up_to


def test_checkpoint_is_a_plain_torch_file_with_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert torch.equal(loaded["state_dict"]["weight"], torch.ones(300, 100))
    found = manifest.check(path)
    assert (found.rollouts, found.updates, found.config_sha256, found.world_size) == (3, 6, "c0ffee", 1)
    assert found.versions["torch"] == torch.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_save_hands_on_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the whole checkpoint in memory: the largest write is the largest tensor."""
    writes = []
    write = manifest._HashingWriter.write
    monkeypatch.setattr(
        manifest._HashingWriter, "write", lambda self, data: writes.append(len(data)) or write(self, data)
    )
    AtomicCheckpointIO().save_checkpoint({str(k): torch.rand(10_000) for k in range(20)}, tmp_path / "a.ckpt")
    assert max(writes) == 40_000
    assert sum(writes) >= 20 * 40_000


def test_disk_full_at_any_byte_keeps_the_old_file(tmp_path: Path) -> None:
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


def test_too_little_space_is_an_error_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 7000, 7000))
    monkeypatch.setattr(torch, "save", None)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written .*: it needs 140,000 bytes, 7,000 are free"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_tensors_share_is_counted_once() -> None:
    base = torch.zeros(100)
    assert bytes_of({"a": base, "b": [base[:10], {"c": torch.zeros(5, dtype=torch.int8)}], "d": "text"}) == 405


def test_directory_is_refused_with_the_strategy_to_use(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is a directory, saved by a sharded strategy, and resumes under that strategy"
    ):
        AtomicCheckpointIO().load_checkpoint(tmp_path)
