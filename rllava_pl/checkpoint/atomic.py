"""Files and directories that appear whole or not at all: written beside their target, flushed to disk, then renamed."""

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
    draft = draft_beside(path)
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def committed_directory(target: Path, facts: Mapping[str, object] | None = None) -> Iterator[Path]:
    """A hidden directory beside ``target`` into which all ranks write; it gets the name when all have ended well.

    Collective. Between the end of the block and the new name every file is hashed and flushed to disk, and
    ``manifest.json`` is written. A kill before the rename leaves what was there before, and a draft that the next start
    removes.

    Args:
        target: The directory to make or replace, on a file system that all ranks see.
        facts: For the manifest: ``rollouts``, ``updates``, ``config_sha256``; ``checkpoint[manifest.FACTS]`` has them.

    Raises:
        OSError: On every rank, if writing failed on any of them; ``target`` is as it was before.
    """
    draft = target.with_name(gather_objects(draft_beside(target).name)[0])
    try:
        with together():
            if rank() == 0:
                remove(draft)  # of a killed process that had the same number
                draft.mkdir(parents=True)
        with locked(draft) if rank() == 0 else nullcontext():
            with together():
                yield draft
            with together():
                own = {name: _content(draft / name) for name in manifest.names_in(draft)[rank() :: world_size()]}
            files = {name: content for part in gather_objects(own) for name, content in part.items()}
            with together():
                if rank() == 0:
                    (draft / manifest.NAME).write_text(manifest.Manifest(files, **(facts or {})).dumps())  # type: ignore[arg-type]
                    replace_directory(draft, target)
    finally:
        if rank() == 0:
            remove(draft)


def _content(path: Path) -> manifest.Content:
    flush(path)
    return manifest.Content(path.stat().st_size, manifest.digest_of(path))


@contextmanager
def together() -> Iterator[None]:
    """An error on one rank becomes an error on all of them, after all have come to the end of the block; collective.

    Raises:
        OSError: The error itself on the rank that had it; its message, with the rank, on the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = gather_objects("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for k, message in enumerate(said):
        if message:
            raise OSError(f"rank {k}: {message}")


def replace_directory(draft: Path, target: Path) -> None:
    """Give a finished directory its name; what was there before is deleted only once the new one is in place.

    A directory cannot be renamed over another, so for an instant neither has the name; a kill in that instant leaves
    both in full, under hidden names beside the target.
    """
    for path in (*draft.rglob("*"), draft):
        flush(path)
    old = draft_beside(target, suffix="old")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    flush(target.parent)
    remove(old)


@contextmanager
def locked(draft: Path) -> Iterator[None]:
    """Marks a draft as being written, as long as block and process live; a no-op where locks are unknown."""
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, names: str) -> None:
    """Delete the drafts that killed processes left in a directory; a draft whose writer lives stays.

    Args:
        directory: Need not exist.
        names: Regular expression: of the files and directories whose drafts are meant.
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


def _in_use(draft: Path) -> bool:
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except OSError:  # gone since, or somebody else's
        return True
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds the lock; the kernel gives it back when its holder dies, however that happens."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


def draft_beside(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name of this process in the same directory, because a rename cannot cross file systems."""
    return path.with_name(f".{path.name}.{suffix}{os.getpid()}")


def flush(path: Path) -> None:
    """Have a file or directory on disk before another name points at it; a no-op where directories cannot be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
