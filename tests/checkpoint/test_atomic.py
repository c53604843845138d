"""Directories that appear complete or not at all, and what killed processes leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import committed_directory, locked, remove_leftovers, temporary_beside
from tests.checkpoint.disks import FACTS, files_up_to


def test_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.ckpt"
    for value in (b"old", b"new"):
        with committed_directory(target, FACTS) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "0.bin").write_bytes(value * 1000)
    assert manifest.check(target).rollouts == 3
    for k in range(20):
        with (
            pytest.raises(OSError, match="File too large"),
            committed_directory(target) as temporary,
            files_up_to(200 * k),
        ):
            (temporary / "0.bin").write_bytes(b"x" * 4000)
    assert (target / "part" / "0.bin").read_bytes() == b"new" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_leftovers_of_killed_processes_are_removed_and_files_being_written_stay(tmp_path: Path) -> None:
    dead, living, foreign = (temporary_beside(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "notes.txt"))
    old = temporary_beside(tmp_path / "c.ckpt", "old")  # killed between the two renames of a directory
    for path in (dead, living, foreign, old):
        path.write_text(path.name)
    with locked(living):
        remove_leftovers(tmp_path, r".+\.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {living.name, foreign.name, "c.ckpt"}
