"""Micro-batches that do not fit in memory: begun again in smaller ones, with the same result."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from rllava_pl.distributed.collectives import world_size
from rllava_pl.loop.experience import join_rows, microbatches, numbered, row_tokens, split
from rllava_pl.loop.phases import Phases
from rllava_pl.strategies import adapter as updates
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput

log = logging.getLogger(__name__)

T = TypeVar("T")

ALLOCATORS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of allocators that report with a plain RuntimeError."""


class Done(NamedTuple, Generic[T]):
    """A micro-batch and what the work on it gave."""

    piece: Experience
    result: T


class Recovery(Phases):
    """How ``RLModule`` goes through an experience in pieces that fit."""

    def in_pieces(
        self, experience: Experience, work: Callable[[Experience, bool], T], *, exchanges: bool = False
    ) -> list[Done[T]]:
        """Do ``work`` on every micro-batch; where one does not fit, the size is halved and all are begun again.

        The smaller size stays for the rest of the run. Losses are sums over counts of the whole mini-batch, so that
        the gradient does not depend on it. Ranks need not agree: what can be begun again talks to nobody before its
        last micro-batch, and the others wait there.

        Args:
            experience: To be taken apart.
            work: Called with a micro-batch and whether it is the last one.
            exchanges: The last one exchanges gradients between ranks. The largest then comes first and the smallest
                last, so that what does not fit is met before anybody waits for it.

        Raises:
            RuntimeError: A single completion does not fit, or ranks would be left in the middle of an exchange.
        """
        restarts, alone = updates.restarts(self.trainer.strategy), not exchanges or world_size() == 1
        size = self.micro_batch_size or len(experience)
        if restarts and not alone:  # the first must show that the one which exchanges will fit
            size = min(size, -(-len(experience) // 2))
        pieces = microbatches(experience, size)
        while True:
            if exchanges:
                pieces.sort(key=_tokens, reverse=True)
            self.tally.begin()
            done: list[Done[T]] = []
            try:
                for k, piece in enumerate(pieces, 1):
                    self.pause()
                    done.append(Done(piece, work(piece, k == len(pieces))))
                return done
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                size = max(len(piece) for piece in pieces)
                if not restarts or size == 1 or (len(done) == len(pieces) - 1 and not alone):
                    raise RuntimeError(_advice(size, restarts)) from error
                done.clear()
            self.micro_batch_size = size // 2
            log.warning("a micro-batch of %d completions does not fit; going on with %d", size, size // 2)
            self._undo(exchanges)
            pieces = split(experience, self.micro_batch_size)

    @torch.no_grad()
    def score(self, policy: Callable[[PolicyBatch], PolicyOutput], experience: Experience) -> PolicyOutput:
        """Log-probs, and values where there is a critic, of an experience under ``policy``, without gradients."""
        with updates.micro_batch(self.trainer.strategy, last=False):  # nothing is exchanged
            done = self.in_pieces(numbered(experience), lambda piece, last: policy(piece.batch))
        pieces, outputs = zip(*done, strict=True)
        columns = zip(*outputs, strict=True)
        return PolicyOutput(*(x[0] if x[0] is None else join_rows(x, pieces, experience.mask_NT) for x in columns))

    def _undo(self, exchanges: bool) -> None:
        """As if the attempt had never been made; its memory is free again."""
        self.tally.undo()
        if exchanges:
            updates.discard_gradients(self.trainer.strategy, self.optimizers().optimizer)  # type: ignore[union-attr]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up, on a GPU or on the host."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(word in str(error) for word in ALLOCATORS)


def _tokens(piece: Experience) -> int:
    return sum(row_tokens(piece))


def _advice(size: int, restarts: bool) -> str:
    if size == 1:
        return (
            "out of memory with a single completion in a micro-batch: lower sampling.max_tokens or the size of the "
            "images, use gradient_checkpointing or lora, or shard the model over more devices"
        )
    why = "this rank alone cannot begin an exchange between ranks again" if restarts else "a sharded pass cannot be"
    return f"out of memory with {size} completions in a micro-batch, and {why}; set micro_batch_size to {size // 2}"
