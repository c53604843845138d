"""Checkpoint files that appear whole or not at all, know what they hold, and are read with care."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import flush, locked, remove, remove_leftovers, replace_directory, temporary_beside


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames; a kill or a full disk leaves the old file as it was.

    The bytes are streamed to the file, so that a checkpoint never needs a second copy of itself in memory. Addresses
    of remote stores (``s3://...``) are left to Lightning.
    """

    def __init__(self) -> None:
        self._swept: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Replace ``path`` by the new checkpoint in one step.

        Raises:
            OSError: The file could not be written, with the bytes that are needed and free; ``path`` is as it was.
        """
        if _is_remote(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._sweep(target.parent)
        draft = temporary_beside(target)
        needed = bytes_of(checkpoint)
        try:
            _require_space(needed, target)
            with draft.open("wb") as file, locked(draft):
                manifest.save_archive(checkpoint, file, _facts(checkpoint))
                file.flush()
                flush(draft)
                (replace_directory if target.is_dir() else Path.replace)(draft, target)
            flush(target.parent)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch hides what the file said
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, _failure(target, needed, cause)) from cause
        finally:
            remove(draft)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file, as tensors and plain data alone unless ``weights_only=False`` says otherwise.

        Raises:
            DamagedCheckpoint: The file is not what its manifest says.
            ValueError: It is a directory, which only the strategy that wrote it can read.
        """
        if not _is_remote(path) and Path(path).exists():
            _refuse_directory(Path(path))
            refuse_damaged(Path(path))
        only = True if weights_only is None else weights_only
        return super().load_checkpoint(path, map_location, only)

    def _sweep(self, directory: Path) -> None:
        """Remove what killed processes left, before the first file of this one."""
        if directory not in self._swept:
            remove_leftovers(directory, r".+\.ckpt")
            self._swept.add(directory)


def bytes_of(checkpoint: object) -> int:
    """Bytes of all tensors in nested dictionaries and lists; memory that several share counts once."""
    storages: dict[int, int] = {}
    left = [checkpoint]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, (list, tuple)):
            left.extend(item)
    return sum(storages.values())


def _is_remote(path: str | Path) -> bool:
    return "://" in os.fspath(path)


def _facts(checkpoint: Mapping[str, object]) -> Mapping[str, object]:
    facts = checkpoint.get(manifest.FACTS)
    return facts if isinstance(facts, Mapping) else {}


def _require_space(needed: int, target: Path) -> None:
    if needed > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failure(target: Path, needed: int, cause: OSError) -> str:
    free = shutil.disk_usage(target.parent).free
    return (
        f"{target} could not be written ({cause.strerror}): it needs {needed:,} bytes, {free:,} are free; what was "
        "there before is untouched"
    )


def _refuse_directory(path: Path) -> None:
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory, saved by a sharded strategy, and goes on under that strategy only; for the "
            "weights alone, name the directory that ExportHF wrote as the policy's path"
        )


def refuse_damaged(path: Path) -> None:
    """Compare a file or directory with its manifest, if it has one.

    Raises:
        DamagedCheckpoint: Naming it, what is wrong, and what to do.
    """
    try:
        manifest.check(path)
    except manifest.NoManifest:  # of another program
        return
    except manifest.DamagedCheckpoint as error:
        raise manifest.DamagedCheckpoint(
            f"{path} is damaged: {error}; `--ckpt_path last` takes the newest whole one"
        ) from None
