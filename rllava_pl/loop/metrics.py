"""Metrics as sums and counts: exact means over micro-batches, mini-batches and ranks, one host transfer a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, sum_over_ranks, world_size

SQUARE = "²"
"""End of the name under which the squares of a metric are added, see ``moments``."""


class Entry(NamedTuple):
    """Sums of several metrics over the same things."""

    names: tuple[str, ...]
    totals: Tensor
    """One a name."""
    number: Tensor | float
    """The number of things in each of the sums."""


class MetricAccumulator:
    """Collects sums and counts by name on the device and divides at the very end.

    Every rank must add the same names; a rank that has nothing adds zeros.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.maxima: list[tuple[str, Tensor]] = []

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add a 0-dim sum and the number of things in it."""
        self.add_all((name,), total[None], count)

    def add_all(self, names: Sequence[str], totals: Tensor, count: Tensor | float = 1.0) -> None:
        """Add several sums (K,) over the same number of things."""
        self.entries.append(Entry(tuple(names), totals.detach(), count))

    def add_total(self, name: str, total: Tensor) -> None:
        """Add to a metric that is the sum over everything and over all ranks, not a mean."""
        first = all(name not in entry.names for entry in self.entries)
        self.add(name, total, 1 / world_size() if first else 0.0)

    def add_masked(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Add the elements of several tensors of one shape where ``mask`` is True."""
        stacked = torch.stack([x.detach() for x in values.values()]).masked_fill(~mask, 0)
        self.add_all(tuple(values), stacked.flatten(1).sum(1, dtype=torch.float64), mask.sum())

    def add_max(self, name: str, x: Tensor, mask: Tensor) -> None:
        """The largest element of ``x`` where ``mask`` is True; they are at least 0."""
        self.maxima.append((name, x.detach().masked_fill(~mask, 0.0).max()))

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks; 0 for a name with count 0. Collective."""
        if not self.entries:
            return {}
        rows: dict[str, int] = {}
        index = [rows.setdefault(name, len(rows)) for entry in self.entries for name in entry.names]
        device = self.entries[-1].totals.device  # those of a checkpoint are on the host
        totals = torch.cat([entry.totals.to(device, torch.float64) for entry in self.entries])
        counts = torch.stack(
            [torch.as_tensor(entry.number, dtype=torch.float64, device=device) for entry in self.entries]
        )
        counts = counts.repeat_interleave(torch.tensor([len(entry.names) for entry in self.entries], device=device))
        sums = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
        sums.index_add_(1, torch.tensor(index, device=device), torch.stack([totals, counts]))
        total, count = sum_over_ranks(sums)
        means: dict[str, float] = dict(zip(rows, (total / count.clamp(min=1e-12)).tolist(), strict=True))
        for name in dict.fromkeys(name for name, _ in self.maxima):
            means[name] = float(max_over_ranks(torch.stack([x for key, x in self.maxima if key == name]).max()))
        for name in [name for name in means if name + SQUARE in means]:
            first, second = means[name], means.pop(name + SQUARE)
            variance = max(second - first * first, 0.0)
            ratio = first * first / second if second else 0.0
            means[name] = variance**0.5 if name.endswith("_std") else ratio
        return means

    def state(self) -> list[list[object]]:
        """What was added before the first update as plain data, for ``restore``."""
        return [[list(names), totals, count] for names, totals, count in self.entries]

    def restore(self, state: list[list[object]]) -> None:
        """Continue from what ``state`` returned."""
        self.entries = [Entry(tuple(names), totals, count) for names, totals, count in state]  # type: ignore[arg-type]
        self.maxima = []

    def snapshot(self) -> tuple[int, int]:
        """This moment, for ``rollback``."""
        return len(self.entries), len(self.maxima)

    def rollback(self, snapshot: tuple[int, int]) -> None:
        """Forget what was added since the snapshot."""
        del self.entries[snapshot[0] :], self.maxima[snapshot[1] :]

    def clear(self) -> None:
        """Forget everything."""
        self.restore([])


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """``x`` and its squares for ``add_masked``: a metric of both.

    A name that ends in ``_std`` becomes the standard deviation sqrt(mean x² - (mean x)²), any other the effective
    sample size of weights as a fraction of the samples, (mean x)² / mean x², in (0, 1].
    """
    x = x.detach().double()
    return {name: x, name + SQUARE: x.square()}
