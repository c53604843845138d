"""Checkpoint files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from rllava_pl.strategies.durable import draft_beside, flush


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
        draft = draft_beside(target)
        try:
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
            flush(draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        flush(target.parent)
