"""Checkpoints in one file: written in one step, with a manifest, and read as tensors and plain data."""

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
    """Writes a temporary file, flushes it, then renames it; a kill or a full disk leaves the old file unchanged.

    The bytes are streamed to the file, so that saving needs no second copy of the checkpoint in memory. Remote
    addresses (``s3://...``) are left to Lightning.
    """

    def __init__(self) -> None:
        self._cleaned: set[Path] = set()
        """Directories without leftovers of earlier processes."""

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Replace ``path`` by the new checkpoint in one step.

        Raises:
            OSError: The file could not be written; states the bytes needed and free. ``path`` is unchanged.
        """
        if _is_remote(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in self._cleaned:
            remove_leftovers(target.parent, r".+\.ckpt")
            self._cleaned.add(target.parent)
        temporary = temporary_beside(target)
        needed = bytes_of(checkpoint)
        facts = checkpoint.get(manifest.FACTS)
        try:
            if needed > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with temporary.open("wb") as file, locked(temporary):
                manifest.save_archive(checkpoint, file, facts if isinstance(facts, Mapping) else {})
                file.flush()
                flush(temporary)
                (replace_directory if target.is_dir() else Path.replace)(temporary, target)
            flush(target.parent)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch raises a RuntimeError instead
            if not isinstance(cause, OSError):
                raise
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                cause.errno,
                f"{target} could not be written ({cause.strerror}): it needs {needed:,} bytes, {free:,} are free; the "
                "previous file is unchanged",
            ) from cause
        finally:
            remove(temporary)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file, as tensors and plain data only unless ``weights_only`` is False.

        Raises:
            DamagedCheckpoint: The file differs from its manifest.
            ValueError: It is a directory, which only the strategy that wrote it can read.
        """
        local = None if _is_remote(path) else Path(path)
        if local and local.is_dir():
            raise ValueError(
                f"{path} is a directory, saved by a sharded strategy, and resumes under that strategy only; to use its "
                "weights, export them with ExportHF and name the export as the policy's path"
            )
        if local and local.exists():
            refuse_damaged(local)
        return super().load_checkpoint(path, map_location, weights_only is not False)


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


def refuse_damaged(path: Path) -> None:
    """Raise ``DamagedCheckpoint`` if a file or directory differs from its manifest; without one it is accepted."""
    try:
        manifest.check(path)
    except manifest.NoManifest:  # written by another program
        return
    except manifest.DamagedCheckpoint as error:
        raise manifest.DamagedCheckpoint(
            f"{path} is damaged: {error}; `--ckpt_path last` resumes the newest intact one"
        ) from None
