"""The prompts of a split, read through whatever data module the Trainer has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from rllava_pl.types import Prompt, PromptBatch

Split = Literal["val", "test"]
Loader = DataLoader[Prompt | None]


def split_loaders(datamodule: LightningDataModule | None, split: Split) -> list[Loader]:
    """Loaders of one split, which hold this rank's part of it; none without data module or without such a split."""
    if datamodule is None or not is_overridden(f"{split}_dataloader", datamodule):
        return []
    sources = getattr(datamodule, "specs", None)
    if isinstance(sources, Mapping) and not sources[split]:
        return []
    if split == "test":
        datamodule.setup("test")  # fitting has prepared the other two only
    if not len(getattr(datamodule, f"{split}_prompts", (None,))):
        return []
    loaders = getattr(datamodule, f"{split}_dataloader")()
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def batches(loaders: Iterable[Loader], limit: float = 1.0) -> Iterator[PromptBatch]:
    """Batches of the loaders, each cut as Lightning reads ``limit``: an int is a number of batches, a float a share."""
    return chain.from_iterable(islice(loader, _limited(limit, len(loader))) for loader in loaders)


def _limited(limit: float, length: int) -> int:
    return min(limit, length) if isinstance(limit, int) else int(limit * length)
