"""Checkpoint files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames; a kill or a full disk leaves the old file as it was.

    The bytes are streamed to the file, so that a checkpoint never needs a second copy of itself in memory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        """Replace ``path`` by the new checkpoint in one step.

        Raises:
            OSError: The file could not be written (disk full, no permission); the temporary file is removed.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")  # beside it: renames stay on a disk
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
