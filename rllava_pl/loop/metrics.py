"""Metrics as sums and counts: exact means over micro-batches, mini-batches and ranks, one host transfer a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, sum_over_ranks, world_size

Derived = Callable[[float, float], float]
"""A metric computed from the means of x and of x²."""
MetricsState = dict[str, list[list[Tensor | float]]]
"""By name: the sums and the counts that were added."""


class MetricAccumulator:
    """Collects ``name -> (sum, count)`` on the device and divides at the very end.

    Every rank must add the same names; a rank that has nothing adds zeros.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, list[Tensor | float]] = {}
        self._derived: dict[str, Derived] = {}
        self._largest: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add a 0-dim sum and the number of things in it."""
        self._sums.setdefault(name, []).append(total.detach())
        self._counts.setdefault(name, []).append(count)

    def add_total(self, name: str, total: Tensor) -> None:
        """Add to a metric that is the sum over everything and over all ranks, not a mean."""
        self.add(name, total, 0.0 if name in self._sums else 1 / world_size())

    def add_masked(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Add the elements of several tensors of one shape where ``mask`` is True."""
        stacked = torch.stack([x.detach() for x in values.values()])
        totals = stacked.masked_fill(~mask, 0).flatten(1).sum(1, dtype=torch.float64)
        count = mask.sum()
        for name, total in zip(values, totals.unbind(), strict=True):
            self.add(name, total, count)

    def add_std(self, name: str, x: Tensor, mask: Tensor) -> None:
        """Standard deviation of the elements of ``x`` where ``mask`` is True: sqrt(mean x² - (mean x)²)."""
        self._add_moments(name, x, mask, lambda first, second: max(second - first * first, 0.0) ** 0.5)

    def add_effective_size(self, name: str, weights: Tensor, mask: Tensor) -> None:
        """Effective sample size of importance weights as a fraction of the samples: (mean w)² / mean w², in (0, 1]."""
        self._add_moments(name, weights, mask, lambda first, second: first * first / second if second else 0.0)

    def add_max(self, name: str, x: Tensor, mask: Tensor) -> None:
        """The largest element of ``x`` where ``mask`` is True; they are at least 0."""
        self._largest.setdefault(name, []).append(x.detach().masked_fill(~mask, 0.0).max())

    def _add_moments(self, name: str, x: Tensor, mask: Tensor, derived: Derived) -> None:
        x = x.detach().double()
        self.add_masked({name: x, _square(name): x.square()}, mask)
        self._derived[name] = derived

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks; 0 for a name with count 0. Collective."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values()))[-1].device  # those of a checkpoint are on the host
        totals = sum_over_ranks(torch.stack([_summed(store, device) for store in (self._sums, self._counts)]))
        means = dict(zip(self._sums, (totals[0] / totals[1].clamp(min=1e-12)).tolist(), strict=True))
        for name, parts in self._largest.items():
            means[name] = float(max_over_ranks(torch.stack(parts).max()))
        for name, derived in self._derived.items():
            if name in means:
                means[name] = derived(means[name], means.pop(_square(name)))
        return means

    def state(self) -> MetricsState:
        """Sums and counts so far as plain data, for ``restore``."""
        return {name: [[*self._sums[name]], [*self._counts[name]]] for name in self._sums}

    def restore(self, state: MetricsState) -> None:
        """Continue from what ``state`` returned."""
        self._sums = {name: [*sums] for name, (sums, _) in state.items()}  # type: ignore[list-item]
        self._counts = {name: [*counts] for name, (_, counts) in state.items()}
        self._derived = {name: derived for name, derived in self._derived.items() if name in state}
        self._largest.clear()

    def snapshot(self) -> tuple[MetricsState, dict[str, list[Tensor]]]:
        """This moment, for ``rollback``."""
        return self.state(), {name: [*parts] for name, parts in self._largest.items()}

    def rollback(self, snapshot: tuple[MetricsState, dict[str, list[Tensor]]]) -> None:
        """Forget what was added since the snapshot."""
        derived = self._derived
        self.restore(snapshot[0])
        self._derived, self._largest = derived, {name: [*parts] for name, parts in snapshot[1].items()}

    def clear(self) -> None:
        """Forget everything."""
        self.restore({})


def _summed(store: Mapping[str, Sequence[Tensor | float]], device: torch.device) -> Tensor:
    """The sum of each name's numbers, float64; those that are no tensors are added on the host."""
    host = [sum(x for x in parts if not isinstance(x, Tensor)) for parts in store.values()]
    total = torch.tensor(host, dtype=torch.float64, device=device)
    tensors = [
        (row, x.to(device, torch.float64))
        for row, parts in enumerate(store.values())
        for x in parts
        if isinstance(x, Tensor)
    ]
    rows, numbers = zip(*tensors, strict=True) if tensors else ((), ())
    return total.index_add(0, torch.tensor(rows, device=device), torch.stack(numbers)) if tensors else total


def _square(name: str) -> str:
    return f"{name}²"
