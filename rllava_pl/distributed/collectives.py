"""Sums and gathers over data-parallel ranks; without a process group each is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Element-wise sum over ranks; the argument stays as it is."""
    return _reduced(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Element-wise maximum over ranks; the argument stays as it is."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return x
    result = x.detach().clone()
    dist.all_reduce(result, op=op)
    return result


def gather_objects(own: T) -> list[T]:
    """What every rank has, in rank order; for small and rare things, which are pickled on the way."""
    everyone = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, own)
    return everyone


def row_gatherer(rows: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], slice]:
    """How to gather tensors with ``rows`` rows here and other numbers of rows on other ranks.

    Returns:
        A function that joins such tensors of all ranks in rank order (widths padded on the right with zeros to the
        widest), and the slice of the result that is this rank's own.
    """
    if world_size() == 1:
        return lambda x: x, slice(0, rows)
    counts = [int(n) for n in _gather(torch.tensor([rows], device=device))]
    start = sum(counts[: rank()])
    return lambda x: _gather_rows(x, counts), slice(start, start + rows)


def _gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def _gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    width = int(max_over_ranks(torch.tensor(x.shape[1], device=x.device))) if x.ndim > 1 else 0
    shape = (max(counts), width) if x.ndim > 1 else (max(counts),)
    padded = torch.zeros(shape, dtype=x.dtype, device=x.device)
    padded[tuple(slice(size) for size in x.shape)] = x
    as_bytes = padded.to(torch.uint8) if x.dtype == torch.bool else padded
    parts = [part[:count] for part, count in zip(_gather(as_bytes), counts, strict=True)]
    return torch.cat(parts).to(x.dtype)
