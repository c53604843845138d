"""Files and directories that appear complete or not at all: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rllava_pl.checkpoint import manifest
from rllava_pl.distributed.collectives import gather_objects, rank, world_size

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def write_text(path: Path, text: str) -> None:
    r"""Replace ``path`` by a UTF-8 file in one step; folders are made as needed.

    Half a surrogate pair, which no file can hold, is written as ``\udxxx``: in a JSON string that is its own escape.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def committed_directory(target: Path, facts: Mapping[str, object] | None = None) -> Iterator[Path]:
    """A hidden directory beside ``target`` into which all ranks write; renamed to ``target`` if all of them succeed.

    Collective. Between the end of the block and the rename every file is hashed and flushed to disk, and
    ``manifest.json`` is written. A kill before the rename leaves the previous ``target``, and a temporary directory
    that the next start removes.

    Args:
        target: The directory to make or replace, on a file system that all ranks see.
        facts: For the manifest: ``rollouts``, ``updates``, ``config_sha256``; ``checkpoint[manifest.FACTS]`` has them.

    Raises:
        OSError: On every rank, if writing failed on any of them; ``target`` is as it was before.
    """
    temporary = target.with_name(gather_objects(temporary_beside(target).name)[0])
    try:
        with raise_on_all_ranks():
            if rank() == 0:
                remove(temporary)  # of a killed process with the same process id
                temporary.mkdir(parents=True)
        with locked(temporary) if rank() == 0 else nullcontext():
            with raise_on_all_ranks():
                yield temporary
            with raise_on_all_ranks():
                names = manifest.names_in(temporary)[rank() :: world_size()]
                for name in names:
                    flush(temporary / name)
                own = {name: manifest.content_of(temporary / name) for name in names}
            files = {name: content for part in gather_objects(own) for name, content in part.items()}
            with raise_on_all_ranks():
                if rank() == 0:
                    text = manifest.Manifest(files, **(facts or {})).dumps()  # type: ignore[arg-type]
                    (temporary / manifest.NAME).write_text(text)
                    replace_directory(temporary, target)
    finally:
        if rank() == 0:
            remove(temporary)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Make an error on one rank an error on all of them, when all have reached the end of the block; collective.

    Raises:
        OSError: On ranks without an error, naming the rank that has one. That rank raises its error itself.
    """
    try:
        yield
    except Exception as error:
        gather_objects(f"{type(error).__name__}: {error}")
        raise
    for k, message in enumerate(gather_objects("")):
        if message:
            raise OSError(f"rank {k}: {message}")


def replace_directory(temporary: Path, target: Path) -> None:
    """Rename a finished directory to ``target``; a previous ``target`` is deleted after that.

    A directory cannot be renamed over another, so for a moment neither has the name; a kill in that moment leaves both
    complete, under hidden names beside ``target``.
    """
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    old = temporary_beside(target, suffix="old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    flush(target.parent)
    remove(old)


@contextmanager
def locked(temporary: Path) -> Iterator[None]:
    """Mark a temporary file as being written until the block or the process ends; a no-op without file locks."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, names: str) -> None:
    """Delete the temporary files that killed processes left in a directory; those of running processes stay.

    Args:
        directory: Need not exist.
        names: Regular expression of the names of their targets.
    """
    pattern = re.compile(rf"\.(?P<name>{names})\.(?P<kind>tmp|old)\d+")
    for path in directory.iterdir() if directory.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and not _in_use(path):
            target = path.with_name(match["name"])
            if match["kind"] == "old" and not target.exists():  # killed between the two renames
                path.rename(target)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_use(temporary: Path) -> bool:
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:  # deleted meanwhile, or of another user
        return True
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock unless another process has it; the kernel releases it when that process ends, in whatever way."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # other errors: some network file systems have no locks
    return True


def temporary_beside(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name in the same directory, with this process's id; a rename cannot cross file systems."""
    return path.with_name(f".{path.name}.{suffix}{os.getpid()}")


def flush(path: Path) -> None:
    """Write a file or directory to disk, before it is renamed; a no-op where directories cannot be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
