"""A parameter that is cut over ranks, gathered and filled one tensor at a time.

FSDP, FSDP2 and ZeRO-3 cut differently, and yet alike: of a flattened parameter w[0..n), rank r of R holds the run
w[b_r..b_{r+1}) with 0 = b_0 <= b_1 <= ... <= b_R = n. So one gather serves all three, and its memory is that of w
alone: every rank sends its run straight to where the others keep it. The strategies' own gathers take a whole unit, or
a padded buffer and a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from rllava_pl.distributed.collectives import rank, world_size


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one parameter.

    Args:
        own: w[b_r..b_{r+1}), one-dimensional; shares memory with the parameter.
        bounds: b_0, ..., b_R, equal on all ranks.
        shape: Of the whole parameter.
    """

    own: Tensor
    bounds: tuple[int, ...]
    shape: torch.Size

    def gather(self, device: torch.device) -> Tensor:
        """The whole parameter in memory of its own; collective, and all it takes is the result."""
        whole = torch.empty(self.bounds[-1], dtype=self.own.dtype, device=device)
        for source, (start, end) in enumerate(pairwise(self.bounds)):
            if source == rank():
                whole[start:end] = self.own
            send(whole[start:end], source)
        return whole.view(self.shape)

    def fill(self, whole: Tensor | None, device: torch.device) -> None:
        """Keep this rank's run of what rank 0 has, in the dtype of the parameter; collective, one tensor at a time."""
        x = torch.empty(self.bounds[-1], dtype=self.own.dtype, device=device)
        if whole is not None:
            x.copy_(whole.detach().flatten())
        send(x, source=0)
        self.own.copy_(x[self.bounds[rank()] : self.bounds[rank() + 1]])


def even_bounds(size: int, run: int) -> tuple[int, ...]:
    """Bounds of ``size`` elements cut every ``run``; the last ranks may have fewer, or none."""
    return tuple(min(size, r * run) for r in range(world_size() + 1))


def shifted(bounds: Iterable[int], start: int, size: int) -> tuple[int, ...]:
    """Bounds within the parameter that begins at ``start`` of a longer, cut vector and has ``size`` elements."""
    return tuple(min(size, max(0, b - start)) for b in bounds)


def send(x: Tensor, source: int) -> None:
    """Overwrite contiguous ``x`` with that of ``source``, whatever its dtype; nothing where it has no elements."""
    if world_size() > 1 and x.numel():
        dist.broadcast(x.detach().view(-1).view(torch.uint8), src=source)


def overwrite(buffer: Tensor, device: torch.device) -> None:
    """Give a tensor that every rank holds whole the value of rank 0, by way of ``device``; collective."""
    x = buffer.detach().to(device).contiguous()
    send(x, source=0)
    buffer.detach().copy_(x)


def gatherer(pieces: Mapping[int, Piece], device: torch.device) -> Callable[[Tensor], Tensor]:
    """How ``hf_weights`` gets at a whole tensor: gathered if it is cut, else as it is.

    Args:
        pieces: By the id of the parameter.
        device: Where gathered tensors lie.
    """

    def full(x: Tensor) -> Tensor:
        piece = pieces.get(id(x))
        return x.detach() if piece is None else piece.gather(device)

    return full
