"""Opening a file that a data set names, below one folder only."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from rllava_pl.datamodules.rejections import RowError, shortened

URL = re.compile(
    r"\s*(?:[a-z][a-z0-9+.-]*:[/\\]|[/\\]{2}|(?:https?|ftp|file|data|blob|javascript):|[a-z][a-z0-9+.-]*::)",
    re.IGNORECASE,
)
"""Anything with a scheme: ``https://a``, ``HTTP:\\\\a``, ``file:/a``, ``data:...``, ``//host/a``, ``zip::a``."""


def is_url(text: str) -> bool:
    """Whether a text is a URL, in any notation."""
    return URL.match(text) is not None


def open_inside(root: Path | None, ref: str, field: str) -> BinaryIO:
    """The regular file at ``ref``, a path relative to ``root``, open for reading.

    Links may be followed as long as they end below the root. The path is resolved first; the result is then opened one
    component at a time from the root on, without following links, so that nothing can be exchanged between the check
    and the opening. Only a regular file is read, and opening a pipe does not block.

    Raises:
        RowError: E06 there is no such file, E07 it is not a regular file below the root, E12 a URL.
    """
    shown = repr(shortened(ref))
    if is_url(ref):
        raise RowError("E12", field, f"{shown} is a URL; download the image and give its path")
    if root is None:
        raise RowError("E07", field, f"{shown} is a path, but this source has no folder; set image_root")
    if Path(ref).is_absolute():
        raise RowError("E07", field, f"{shown} is absolute; give it relative to image_root ({root})")
    if "\0" in ref:
        raise RowError("E07", field, f"{shown} has a NUL character, which paths cannot have")
    try:
        top = root.resolve()
        path = (top / ref).resolve()
        inside = path.is_relative_to(top)
        file = _open_below(top, path.relative_to(top).parts) if inside else None
    except FileNotFoundError as error:
        raise RowError("E06", field, f"{shown} is not in image_root ({root})") from error
    except (OSError, ValueError, RuntimeError) as error:  # no permission, name too long, lone surrogate, loop of links
        reason = getattr(error, "strerror", None) or str(error)
        raise RowError("E06", field, f"{shown} cannot be opened: {reason}") from error
    if file is None:
        reason = "is not a regular file" if inside else f"leads outside image_root ({root})"
        raise RowError("E07", field, f"{shown} {reason}")
    return file


def _open_below(root: Path, parts: tuple[str, ...]) -> BinaryIO | None:
    """The file, every component opened without following links; None if it is not a regular file."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in parts[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        if not parts or not stat.S_ISREG(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            return None
        file = os.fdopen(os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb")
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged since the check
        file.close()
        return None
    return file
