"""The prompts of a split of the Trainer's data module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from rllava_pl.types import Prompt, PromptBatch

Loader = DataLoader[Prompt | None]


def split_loaders(datamodule: LightningDataModule | None, split: Literal["val", "test"]) -> list[Loader]:
    """Loaders of this rank's part of a split; empty without a data module or without this split."""
    if datamodule is None or not is_overridden(f"{split}_dataloader", datamodule):
        return []
    sources = getattr(datamodule, "specs", None)
    if isinstance(sources, Mapping) and not sources[split]:
        return []
    if split == "test":
        datamodule.setup("test")  # fitting has set up the other two only
    if not len(getattr(datamodule, f"{split}_prompts", (None,))):
        return []
    loaders = getattr(datamodule, f"{split}_dataloader")()
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def batches(loaders: Iterable[Loader], limit: float = 1.0) -> Iterator[PromptBatch]:
    """The first batches of each loader: a number (int ``limit``) or a fraction (float) of them, as in Lightning."""
    return chain.from_iterable(
        islice(loader, limit if isinstance(limit, int) else int(limit * len(loader))) for loader in loaders
    )
