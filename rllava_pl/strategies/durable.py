"""Files and directories that appear whole or not at all: written beside their target, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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
    shutil.rmtree(old, ignore_errors=True)


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
