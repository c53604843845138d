"""Metrics as sums and counts: exact means over micro-batches, mini-batches and ranks, one host transfer a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.strategies.collectives import sum_over_ranks


class Tally:
    """Collects ``name -> (sum, count)`` on the device and divides at the very end.

    Every rank must add the same names; a rank that has nothing adds zeros.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float = 1) -> None:
        """Add a 0-dim sum and the number of things in it."""
        self._sums.setdefault(name, []).append(total.detach())
        self._counts.setdefault(name, []).append(torch.as_tensor(count, dtype=torch.float64, device=total.device))

    def add_masked(self, name: str, x: Tensor, mask: Tensor) -> None:
        """Add the elements of ``x`` where ``mask`` is True."""
        self.add(name, x.detach().masked_fill(~mask, 0.0).sum(), mask.sum())

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks; 0 for a name with count 0. Collective."""
        if not self._sums:
            return {}
        sums = torch.stack([torch.stack([x.double() for x in parts]).sum() for parts in self._sums.values()])
        counts = torch.stack([torch.stack([x.double() for x in parts]).sum() for parts in self._counts.values()])
        totals = sum_over_ranks(torch.stack([sums, counts]))
        return dict(zip(self._sums, (totals[0] / totals[1].clamp(min=1e-12)).tolist(), strict=True))
