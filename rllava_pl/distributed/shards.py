"""A parameter that is sharded over ranks: gathered, and filled from rank 0, one tensor at a time.

FSDP, FSDP2 and ZeRO-3 shard differently but share one layout: of a flattened parameter w[0..n), rank r of R holds the
range w[b_r..b_{r+1}) with 0 = b_0 <= b_1 <= ... <= b_R = n. One all-gather therefore serves all three. It needs the
memory of w alone, because every rank broadcasts its range directly into the result; the gathers of the strategies
themselves need the parameters of a whole layer, or a padded buffer and a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from rllava_pl.distributed.collectives import rank, world_size


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank holds.

    Args:
        local: w[b_r..b_{r+1}), one-dimensional; shares memory with the parameter.
        bounds: b_0, ..., b_R, equal on all ranks.
        shape: Of the whole parameter.
    """

    local: Tensor
    bounds: tuple[int, ...]
    shape: torch.Size

    def full_tensor(self, device: torch.device) -> Tensor:
        """The whole parameter as a new tensor on ``device``; collective, allocates nothing but the result."""
        full = torch.empty(self.bounds[-1], dtype=self.local.dtype, device=device)
        for source, (start, stop) in enumerate(pairwise(self.bounds)):
            if source == rank():
                full[start:stop] = self.local
            broadcast(full[start:stop], source)
        return full.view(self.shape)

    def copy_from_rank0(self, full: Tensor | None, device: torch.device) -> None:
        """Fill the local part from rank 0's ``full`` (None on other ranks), sent through ``device``; collective."""
        x = torch.empty(self.bounds[-1], dtype=self.local.dtype, device=device)
        if full is not None:
            x.copy_(full.detach().flatten())
        broadcast(x, source=0)
        self.local.copy_(x[self.bounds[rank()] : self.bounds[rank() + 1]])

    def with_local(self, local: Tensor) -> Shard:
        """The shard of another tensor with the same layout, such as a moment of the optimizer."""
        return Shard(local.detach().flatten(), self.bounds, self.shape)


def even_bounds(numel: int, length: int) -> tuple[int, ...]:
    """Bounds of ``numel`` elements in ranges of ``length``; the last ranks may have fewer, or none."""
    return tuple(min(numel, r * length) for r in range(world_size() + 1))


def bounds_within(bounds: Iterable[int], start: int, numel: int) -> tuple[int, ...]:
    """Bounds of the ``numel`` elements from ``start`` on of a longer vector that is cut at ``bounds``."""
    return tuple(min(numel, max(0, b - start)) for b in bounds)


def broadcast(x: Tensor, source: int) -> None:
    """Overwrite contiguous ``x`` with that of rank ``source``, whatever its dtype; a no-op if it has no elements."""
    if world_size() > 1 and x.numel():
        dist.broadcast(x.detach().view(-1).view(torch.uint8), src=source)
