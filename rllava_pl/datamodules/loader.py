"""Order of the prompts and exact resume: a prompt's rank and step are a function of counters only.

Batch ``k`` of an epoch holds, over all ranks, the entries ``[k * B * W, (k + 1) * B * W)`` of that epoch's order
(``B`` prompts a rank, ``W`` ranks); rank ``r`` takes every ``W``-th of them. Two integers, epoch and position, are
therefore the whole state, the same on every rank, and one rank's checkpoint restores all.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence, Sized
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.types import Prompt, PromptBatch

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.progress import _Progress

PADDING = -1
"""Index of no prompt: it pads short ranks in evaluation; ``PromptBatch`` drops it."""


class PromptDataset(Dataset["Prompt | None"]):
    """Prompts of any sequence, which may build them lazily, by index; ``PADDING`` gives None."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt | None:
        return None if index == PADDING else self.prompts[index]


class PromptSampler(DistributedSampler[int]):
    """Indices of one rank, a pure function of (seed, epoch, rank, number of ranks).

    A subclass of torch's ``DistributedSampler``, so that Lightning keeps it and announces every epoch through
    ``set_epoch``. Unlike its parent it never repeats a row to make the ranks equal.

    Args:
        dataset: Only its length is used.
        num_replicas: Number of ranks that share the rows.
        rank: The rank that reads through this sampler.
        shuffle: A new permutation each epoch; otherwise the rows in their order.
        seed: Seed of the permutations.
        drop_last: Whether the remainder of ``len(dataset) / num_replicas`` is dropped (training), or kept, with the
            short ranks padded by ``PADDING`` (evaluation). Either way all ranks have equally many entries.
    """

    start: int = 0
    """Entries of this rank that the next iteration skips, because they were used before an interruption."""

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.rows = len(dataset)
        self.num_samples = self.rows // num_replicas if drop_last else -(-self.rows // num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[int]:
        order: Sequence[int] = range(self.rows)
        if self.shuffle:
            order = permutation(seed_from(self.seed, "order", self.epoch), self.rows)
        mine = [int(index) for index in order[self.rank : self.total_size : self.num_replicas]]
        mine += [PADDING] * (self.num_samples - len(mine))
        return iter(mine[self.start :])


class PromptLoader(DataLoader["Prompt | None"]):
    """Training loader that resumes at the very next batch, whatever the workers had fetched ahead.

    Lightning stores ``state_dict()`` in every checkpoint and restores it before training resumes. The position counts
    batches that the trainer has finished, so a checkpoint written in the middle of a step repeats that step's batch.

    It takes the arguments of ``DataLoader``; the sampler is a ``PromptSampler``. Any other, such as the one Lightning
    uses for ``overfit_batches``, works, but restarts its epoch after an interruption.
    """

    fit_loop: _FitLoop | None = None
    """The trainer's loop, which counts finished steps; without it every batch yielded counts as finished."""
    _epoch = 0
    _yielded = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        """Batches of the sampler's epoch, from the restored position on.

        A generator, so that nothing runs before the first ``next``: Lightning calls ``iter`` before ``set_epoch`` at
        the start of a run, and worker processes would begin to fetch the wrong epoch.
        """
        self._epoch = getattr(self.sampler, "epoch", 0)
        epoch, position = self._resume or (self._epoch, 0)
        self._resume = None  # used once, and only in its epoch
        self._yielded = position if epoch == self._epoch and isinstance(self.sampler, PromptSampler) else 0
        if isinstance(self.sampler, PromptSampler):
            self.sampler.start = self._yielded * (self.batch_size or 1)
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def _shape(self) -> dict[str, int]:
        """What a position refers to; with other values it would point at other prompts."""
        ranks, seed = getattr(self.sampler, "num_replicas", 1), getattr(self.sampler, "seed", 0)
        rows = len(self.dataset)  # type: ignore[arg-type]
        return {"prompts_per_batch": (self.batch_size or 1) * ranks, "rows": rows, "seed": seed}

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its finished batches, with the shape they refer to."""
        epoch, position = self._resume or (self._epoch, self._yielded)
        if self._resume is None and self.fit_loop is not None:  # iterated since it was restored
            position = min(position, _processed(self.fit_loop.epoch_loop.batch_progress))
        return {"epoch": epoch, "position": position, **self._shape()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: Batch size, number of rows or seed differ from those of the checkpoint.
        """
        shape = self._shape()
        wrong = [f"{name} was {state[name]}, is {now}" for name, now in shape.items() if state[name] != now]
        if wrong:
            raise ValueError(
                f"cannot resume in epoch {state['epoch']} after batch {state['position']}: {'; '.join(wrong)}. "
                "The position would point at other prompts (prompts_per_batch = batch_size x ranks). Restore the old "
                "values, or start a new run from the checkpoint's weights."
            )
        self._resume = (state["epoch"], state["position"])
        if self.fit_loop is not None and _processed(self.fit_loop.epoch_progress) > state["epoch"]:
            # Taken between two epochs. Lightning 2.6 would keep counting in the old one and end the new one early.
            self.fit_loop.epoch_loop.batch_progress.reset_on_run()
        if isinstance(self.sampler, PromptSampler):
            self.sampler.set_epoch(state["epoch"])


def _processed(progress: _Progress) -> int:
    """Number of finished batches of the epoch, or of finished epochs."""
    return int(progress.current.state_dict()["processed"])


def ignore_signals(worker: int) -> None:
    """For ``worker_init_fn``: a signal to all processes of a job must not end the workers before the trainer.

    Schedulers and ``kill -- -GROUP`` signal every process. If a worker exited at once, the trainer's step would fail
    before anything is saved; so workers run until the trainer closes them or has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def separate_generator(seed: int) -> torch.Generator:
    """A generator for a loader, which would otherwise draw from, and so advance, torch's global one."""
    return torch.Generator().manual_seed(seed_from(seed, "workers"))
