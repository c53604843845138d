"""Micro-batches: a batch in parts that fit in memory, with smaller parts after an out-of-memory error."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, world_size
from rllava_pl.loop.batch import masked_out
from rllava_pl.loop.options import Batching
from rllava_pl.types import BatchT, ScoredBatch

log = logging.getLogger(__name__)

T = TypeVar("T")

ALLOCATORS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""What allocators that raise a plain RuntimeError write."""


class Result(NamedTuple, Generic[BatchT, T]):
    """A micro-batch and what the work on it returned."""

    batch: BatchT
    value: T


class MicroBatches:
    """Runs work on a batch in micro-batches; where one does not fit in memory, all are run again at half the size.

    Losses are sums over counts of the whole mini-batch, so the size does not change the gradient. The smaller size
    stays for the rest of the run.

    Args:
        batching: The size to begin with.
        rows_together: Consecutive rows of a group that must not be separated, such as a preference pair.
    """

    def __init__(self, batching: Batching, rows_together: int = 1) -> None:
        self.size = batching.micro_batch_size
        self.tokens = batching.micro_batch_tokens
        self.rows_together = rows_together

    def run(
        self,
        batch: BatchT,
        work: Callable[[BatchT, bool], T],
        *,
        can_retry: bool,
        exchanges_gradients: bool = False,
        before_retry: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> list[Result[BatchT, T]]:
        """Call ``work(micro_batch, is_last)`` on every micro-batch.

        Ranks need not agree on sizes: with ``can_retry`` a rank communicates in its last micro-batch only, and the
        others wait for it there.

        Args:
            batch: What is split.
            work: Called once a micro-batch.
            can_retry: Whether a rank may start over before its last micro-batch.
            exchanges_gradients: The last micro-batch exchanges gradients between ranks. The largest then comes first
                and the smallest last, so that an out-of-memory error comes before any rank waits.
            before_retry: Undoes what ``work`` has done so far.
            between: Called before every micro-batch; what it raises ends the work.

        Raises:
            RuntimeError: A single completion does not fit, or ranks would be left in the middle of an exchange.
        """
        alone = not exchanges_gradients or world_size() == 1
        size = self.size or len(batch)
        if can_retry and not alone:  # the first micro-batch must show that the one which communicates will fit
            size = min(size, -(-len(batch) // 2))
        micro_batches = self._equally_many(self.split(batch, size))
        while True:
            if exchanges_gradients:
                micro_batches.sort(key=lambda part: sum(row_tokens(part)), reverse=True)
            results: list[Result[BatchT, T]] = []
            try:
                for k, part in enumerate(micro_batches, 1):
                    between()
                    results.append(Result(part, work(part, k == len(micro_batches))))
                return results
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                size = max(len(part) for part in micro_batches)
                smallest = size <= self.rows_together
                if not can_retry or smallest or (len(results) == len(micro_batches) - 1 and not alone):
                    raise RuntimeError(self._advice(size, can_retry)) from error
                results.clear()
            self.size = max(size // 2 // self.rows_together, 1) * self.rows_together
            log.warning("a micro-batch of %d completions does not fit in memory; continuing with %d", size, self.size)
            before_retry()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            micro_batches = self.split(batch, self.size)

    def split(self, batch: BatchT, size: int) -> list[BatchT]:
        """Micro-batches of at most ``size`` rows and ``micro_batch_tokens`` tokens, nearly equal in tokens.

        Whole groups as long as they fit, since a group shares its prompt; else parts of a group, which is exact but
        computes the prompt once a part. Peak memory is that of the largest micro-batch, so long and short prompts are
        mixed: the order of prompts is not kept.
        """
        group, tokens = batch.group_size, row_tokens(batch)
        most_rows = [self._most_rows(batch, p, size) for p in range(len(batch.inputs))]
        whole = [p for p, rows in enumerate(most_rows) if rows >= group]
        parts = [
            batch.select([p], range(first, min(first + rows, group)))
            for p, rows in enumerate(most_rows)
            if rows < group
            for first in range(0, group, rows)
        ]
        groups_a_part = max(1, size // group)
        count = -(-len(whole) // groups_a_part)
        while count:
            chosen = balance([tokens[p] for p in whole], count, groups_a_part)
            fits = not self.tokens or max(sum(tokens[whole[k]] for k in part) for part in chosen) <= self.tokens
            if fits or count == len(whole):  # a single group above the limit cannot be split further
                break
            count += 1
        if count == 1 and not parts:
            return [batch]
        return [batch.select([whole[k] for k in part]) for part in chosen if part] + parts if count else parts

    def _most_rows(self, batch: ScoredBatch, p: int, size: int) -> int:
        """Rows of prompt ``p`` in one micro-batch, as many as fit and whole units of ``rows_together``."""
        group = batch.group_size
        if self.tokens:
            longest = max(len(rollout.response_ids) for rollout in batch.rollouts[p * group : (p + 1) * group])
            size = min(size, (self.tokens - len(batch.inputs[p])) // max(1, longest))
        return max(size // self.rows_together, 1) * self.rows_together

    def _equally_many(self, micro_batches: list[BatchT]) -> list[BatchT]:
        """The same number on every rank; those added are masked out. Collective."""
        count = torch.tensor(len(micro_batches), device=micro_batches[0].trained_mask_NT.device)
        missing = int(max_over_ranks(count)) - len(micro_batches) if world_size() > 1 else 0
        return micro_batches + [masked_out(micro_batches[0])] * missing

    def _advice(self, size: int, can_retry: bool) -> str:
        if size <= self.rows_together:
            return (
                "out of memory with a single completion in a micro-batch: lower sampling.max_tokens or the size of the "
                "images, use gradient_checkpointing or lora, or shard the model over more devices"
            )
        alone, sharded = "one rank alone cannot repeat an exchange between ranks", "a sharded pass cannot be repeated"
        return (
            f"out of memory with {size} completions in a micro-batch, and {alone if can_retry else sharded}; "
            f"set batching.micro_batch_size to {size // 2}"
        )


def row_tokens(batch: ScoredBatch) -> list[int]:
    """Tokens of every prompt with its responses, as they stand in a packed row."""
    group = batch.group_size
    responses = [len(rollout.response_ids) for rollout in batch.rollouts]
    return [len(x) + sum(responses[p * group : (p + 1) * group]) for p, x in enumerate(batch.inputs)]


def balance(weights: Sequence[int], parts: int, most: int) -> list[list[int]]:
    """Positions of ``weights`` in ``parts`` of at most ``most``: heaviest first, each to the lightest below ``most``.

    >>> balance([9, 1, 2, 8], parts=2, most=2)
    [[0, 1], [2, 3]]
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for position in sorted(range(len(weights)), key=lambda k: -weights[k]):
        not_full = (part for part in chosen if len(part) < most)
        min(not_full, key=lambda part: sum(weights[k] for k in part)).append(position)
    return [sorted(part) for part in chosen]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed, on a GPU or on the host."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(word in str(error) for word in ALLOCATORS)


def numbered(batch: BatchT) -> BatchT:
    """The same with each row's position for its group id, to find the rows of micro-batches again."""
    return batch.replace(group_N=torch.arange(len(batch), device=batch.trained_mask_NT.device))


def join_rows(tensors: Sequence[Tensor], micro_batches: Sequence[ScoredBatch], like_NT: Tensor) -> Tensor:
    """Per-token tensors of the micro-batches of a ``numbered`` batch as (N, T)."""
    joined_NT = tensors[0].new_zeros(like_NT.shape)
    for x, part in zip(tensors, micro_batches, strict=True):
        joined_NT[:, : x.shape[1]].index_add_(0, part.group_N, x)  # masked-out rows add 0
    return joined_NT
