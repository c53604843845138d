"""The data module all others derive from: it turns lists of prompts into loaders."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from rllava_pl.datamodules.loader import PromptDataset, PromptLoader, PromptSampler, ignore_signals, separate_generator
from rllava_pl.types import Prompt, PromptBatch

log = logging.getLogger(__name__)


class BaseDataModule(LightningDataModule):
    """Prompts for training, validation and test.

    A subclass fills ``train_prompts``, ``val_prompts`` and ``test_prompts`` in ``setup(stage)``, with any sequences of
    ``Prompt``; a sequence may build its prompts lazily. Loaders, order, sharding over ranks and exact resume are here.

    Args:
        batch_size: Prompts of one rollout on each rank.
        val_batch_size: Prompts of one validation, test or prediction batch on each rank.
        num_workers: Processes that prepare prompts ahead; 0 prepares them in the training process.
        seed: Seed of the training order, which differs from epoch to epoch.
    """

    def __init__(self, batch_size: int = 32, val_batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a batch needs at least 1 prompt")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; use 0 to prepare prompts in the training process")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_prompts: Sequence[Prompt] = ()
        self.val_prompts: Sequence[Prompt] = ()
        self.test_prompts: Sequence[Prompt] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Let ``inspect.signature`` show the options above in subclasses that pass them on as ``**loader_options``."""
        super().__init_subclass__(**kwargs)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            common = inspect.signature(BaseDataModule.__init__).parameters
            names = {parameter.name for parameter in own}
            own = [*own[:-1], *(p for name, p in list(common.items())[1:] if name not in names)]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def train_dataloader(self) -> PromptLoader:
        """Shuffled batches; prompts that do not fill a batch on every rank are left out of the epoch.

        Raises:
            ValueError: The training set is smaller than one batch over all ranks.
        """
        ranks, rank = self._shard()
        rows, needed = len(self.train_prompts), self.batch_size * ranks
        if rows < needed:
            raise ValueError(
                f"batch_size {self.batch_size} x {ranks} rank{'s' * (ranks > 1)} = {needed} prompts a rollout, "
                f"but the training set has {rows}; set batch_size to {rows // ranks} or less, or add rows"
            )
        if rows % needed:
            log.info("each epoch leaves out %d of %d training prompts (batches of %d)", rows % needed, rows, needed)
        dataset = PromptDataset(self.train_prompts)
        sampler = PromptSampler(dataset, ranks, rank, shuffle=True, seed=self.seed, drop_last=True)
        loader = PromptLoader(dataset, drop_last=True, **self._loader_options(sampler, self.batch_size))
        loader.fit_loop = self.trainer.fit_loop if self.trainer is not None else None
        return loader

    def val_dataloader(self) -> DataLoader[Prompt | None] | list[DataLoader[Prompt | None]]:
        """Validation batches in the order of the rows; an empty list (no validation) without validation prompts."""
        return self._eval_loader(self.val_prompts) if len(self.val_prompts) else []

    def test_dataloader(self) -> DataLoader[Prompt | None]:
        """Test batches in the order of the rows; every row occurs once, on any number of ranks."""
        if not len(self.test_prompts):
            raise ValueError(f"{type(self).__name__} has no test prompts")
        return self._eval_loader(self.test_prompts)

    def predict_dataloader(self) -> DataLoader[Prompt | None]:
        """The test split."""
        return self.test_dataloader()

    def _eval_loader(self, prompts: Sequence[Prompt]) -> DataLoader[Prompt | None]:
        dataset = PromptDataset(prompts)
        sampler = PromptSampler(dataset, *self._shard(), shuffle=False, drop_last=False)
        return DataLoader(dataset, **self._loader_options(sampler, self.val_batch_size))

    def _loader_options(self, sampler: PromptSampler, batch_size: int) -> dict[str, Any]:
        return {
            "sampler": sampler,
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "worker_init_fn": ignore_signals,
            "collate_fn": PromptBatch,
            "generator": separate_generator(self.seed),
        }

    def _shard(self) -> tuple[int, int]:
        """Number of data-parallel ranks and this one; (1, 0) without a trainer.

        The strategy decides: ranks that hold parts of one model (tensor parallelism) read the same prompts.
        """
        if self.trainer is None:
            return 1, 0
        shard = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return (shard["num_replicas"], shard["rank"]) if shard else (self.trainer.world_size, self.trainer.global_rank)
