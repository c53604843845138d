"""The answers of ``predict`` as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.checkpoint.atomic import write_text
from rllava_pl.distributed.collectives import world_size
from rllava_pl.types import Json, Rollout


class RolloutWriter(Callback):
    """Writes the answers of ``predict`` as JSON lines, in the order of the data set on any number of ranks.

    One line: ``{"uid": "digits:17", "text": "<answer>4</answer>", "answer": "4", "finish_reason": "stop",
    "response_tokens": 4}``, where ``answer`` is the expected one. The file is written at the end.

    Args:
        path: File to write; by default ``predictions.jsonl`` in the run's folder.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._rows: list[dict[str, Json]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        self._rows = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Iterable[Rollout], *_: object
    ) -> None:
        """Keep the rows of the file, without tensors and images."""
        self._rows += [
            {
                "uid": rollout.prompt.uid,
                "text": rollout.text,
                "answer": rollout.prompt.answer,
                "finish_reason": rollout.finish_reason,
                "response_tokens": len(rollout.response_ids),
            }
            for rollout in outputs
        ]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all ranks and write them."""
        path = Path(self.path) if self.path else run_directory(trainer) / "predictions.jsonl"
        parts = [self._rows] * world_size()
        if world_size() > 1:
            dist.all_gather_object(parts, self._rows)
        # Rank r of W has rows r, r + W, r + 2W, ... of the split.
        rows = [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]
        if trainer.is_global_zero:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{len(rows)} predictions: {shown(path)}")
