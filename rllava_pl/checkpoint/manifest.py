"""The manifest of a checkpoint: sizes and SHA-256 of its files, progress of the run, versions that wrote it.

A sharded checkpoint is a directory with a ``manifest.json``. A checkpoint in one file is what ``torch.save`` writes, a
ZIP archive, and its manifest is the comment of the archive: one rename commits both, ``torch.load`` reads the file as
usual, ``unzip -z FILE`` prints the manifest, and a copy of the file has it, too.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn

import rllava_pl
from rllava_pl.distributed.collectives import world_size

FORMAT = 1
NAME = "manifest.json"
"""File name of a directory's manifest."""
FACTS = "rllava_pl_manifest"
"""Key of a Lightning checkpoint under which a module stores the facts for the manifest."""
ARCHIVE = "archive"
"""Name, in the manifest of a single file, for everything before the comment."""
END = struct.Struct("<H")
"""Last field of a ZIP archive before the comment: the comment's length."""

_intact: set[tuple[Path, tuple[int, ...]]] = set()
"""Checkpoints that this process has checked, with the times at which they last changed."""


class DamagedCheckpoint(ValueError):
    """A checkpoint differs from what was saved, or has no readable manifest."""


class NoManifest(DamagedCheckpoint):
    """A checkpoint that another program wrote."""


@dataclass(frozen=True)
class Content:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was saved. Counters are 0 if the module has none."""

    files: Mapping[str, Content]
    """By path within the directory."""
    rollouts: int = 0
    """Finished passes of the loop."""
    updates: int = 0
    """Optimizer steps."""
    config_sha256: str = ""
    """Hash of the options that the module was built with."""
    world_size: int = field(default_factory=world_size)
    """Number of ranks that wrote it."""
    saved_at_ns: int = field(default_factory=time.time_ns)
    """Time since 1970; decides which of several is the newest."""
    versions: Mapping[str, str] = field(
        default_factory=lambda: {module.__name__: str(module.__version__) for module in (rllava_pl, torch, lightning)}
    )
    """Versions of the packages that wrote it."""
    format: int = FORMAT

    def dumps(self) -> str:
        """As JSON that carries its own SHA-256."""
        body = asdict(self)
        return json.dumps({"sha256": _digest_of_body(body), **body})

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """The inverse of ``dumps``.

        Raises:
            DamagedCheckpoint: Not what ``dumps`` wrote, or written by a later version.
        """
        try:
            body = json.loads(text)
            digest = body.pop("sha256")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise DamagedCheckpoint("its manifest cannot be read") from None
        if digest != _digest_of_body(body):
            raise DamagedCheckpoint("its manifest was changed")
        if body.get("format") != FORMAT:
            raise DamagedCheckpoint(f"its format is {body.get('format')}, this version reads {FORMAT}")
        try:
            files = {name: Content(int(x["bytes"]), str(x["sha256"])) for name, x in body["files"].items()}
            counters = {name: int(body[name]) for name in ("rollouts", "updates", "world_size", "saved_at_ns")}
            return cls(files, config_sha256=str(body["config_sha256"]), versions=dict(body["versions"]), **counters)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DamagedCheckpoint(f"a field of its manifest is missing or wrong: {error!r}") from None


def read(checkpoint: Path) -> Manifest:
    """The manifest of a file or directory; compares names and sizes, but not contents.

    Raises:
        DamagedCheckpoint: There is no manifest, or a file is missing, unexpected or of another size.
    """
    if checkpoint.is_dir():
        names = names_in(checkpoint)
        text = (checkpoint / NAME).read_bytes() if NAME in names else b""
        sizes = {name: (checkpoint / name).stat().st_size for name in names if name != NAME}
    else:
        try:
            with zipfile.ZipFile(checkpoint) as archive:
                text = archive.comment
        except (zipfile.BadZipFile, OSError) as error:
            raise DamagedCheckpoint(f"it cannot be read ({error})") from error
        sizes = {ARCHIVE: checkpoint.stat().st_size - len(text)}
    if not text:
        raise NoManifest("it has no manifest")
    manifest = Manifest.loads(text)
    for name in sorted(sizes.keys() | manifest.files.keys()):
        expected = manifest.files[name].bytes if name in manifest.files else None
        if sizes.get(name) != expected:
            raise DamagedCheckpoint(f"{name} has {sizes.get(name)} bytes, the manifest says {expected}")
    return manifest


def check(checkpoint: Path) -> Manifest:
    """As ``read``, and compares the contents, only once unless a file changes."""
    manifest = read(checkpoint)
    paths = [checkpoint / name for name in names_in(checkpoint)] if checkpoint.is_dir() else [checkpoint]
    state = (checkpoint.absolute(), tuple(path.stat().st_mtime_ns for path in paths))
    if state in _intact:
        return manifest
    for name, content in manifest.files.items():
        found = _archive_of(checkpoint, content.bytes) if name == ARCHIVE else content_of(checkpoint / name)
        if found != content:
            raise DamagedCheckpoint(f"{name} was changed: its SHA-256 is not the one in the manifest")
    _intact.add(state)
    return manifest


def newest(checkpoints: Iterable[Path]) -> Path | None:
    """The newest intact checkpoint, None if there are no checkpoints; a warning names the damaged ones.

    Raises:
        DamagedCheckpoint: All of them are damaged.
    """
    found: dict[Path, Manifest] = {}
    damaged: dict[Path, str] = {}
    for path in checkpoints:
        try:
            found[path] = read(path)
        except (DamagedCheckpoint, OSError) as error:
            damaged[path] = str(error)
    intact = None
    for path in sorted(found, key=lambda path: found[path].saved_at_ns, reverse=True):
        try:
            check(path)
        except (DamagedCheckpoint, OSError) as error:
            damaged[path] = str(error)
        else:
            intact = path
            break
    listing = "; ".join(f"{path}: {why}" for path, why in sorted(damaged.items()))
    if damaged and intact is None:
        raise DamagedCheckpoint(f"no checkpoint is intact: {listing}; to start a new run, move them away")
    if damaged:
        rank_zero_warn(f"resuming {intact}, the newest intact checkpoint; damaged: {listing}")
    return intact


def content_of(path: Path) -> Content:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return Content(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def save_archive(checkpoint: Mapping[str, object], file: BinaryIO, facts: Mapping[str, object]) -> None:
    """``torch.save`` with a manifest; hashes while it writes, so that nothing is read twice."""
    writer = _HashingWriter(file)
    torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it calls write and flush only
    content = Content(file.tell(), writer.digest.hexdigest())
    comment = Manifest({ARCHIVE: content}, **facts).dumps().encode()  # type: ignore[arg-type]
    file.seek(-END.size, 2)
    file.write(END.pack(len(comment)) + comment)


class _HashingWriter:
    """Hashes what is written to a file; torch writes sequentially."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def names_in(directory: Path) -> list[str]:
    """Paths of all files in a directory, relative to it, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _archive_of(path: Path, size: int) -> Content:
    """Size and hash of the archive as it was before the comment was added."""
    digest, left = hashlib.sha256(), size - END.size
    with path.open("rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    digest.update(END.pack(0))
    return Content(size, digest.hexdigest())


def _digest_of_body(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
