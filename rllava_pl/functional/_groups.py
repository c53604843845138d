"""Statistics over groups of samples, without a loop over the groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rllava_pl.functional._numerics import raised


@dataclass(frozen=True)
class Groups:
    """The assignment of N samples to K groups.

    Example: ids (7, 3, 7) give ``index_N = (1, 0, 1)`` and ``sizes_K = (1, 2)``.
    """

    index_N: Tensor
    """int64 (N,): position of each sample's group, 0..K-1."""
    sizes_K: Tensor
    """int64 (K,): samples of each group."""

    @classmethod
    def of(cls, group_N: Tensor, values_N: Tensor) -> Groups:
        """Number the groups; ids are arbitrary, unordered, and groups may be unequal."""
        if group_N.ndim != 1 or group_N.shape != values_N.shape:
            raise ValueError(
                f"group_N has shape {tuple(group_N.shape)}, the values have {tuple(values_N.shape)}; "
                "both must be (N,), one entry a sample"
            )
        _, index_N, sizes_K = torch.unique(group_N, return_inverse=True, return_counts=True)
        return cls(index_N, sizes_K)

    @property
    def size_N(self) -> Tensor:
        """int64 (N,): size of each sample's group."""
        return self.sizes_K[self.index_N]

    def sum(self, values_N: Tensor) -> Tensor:
        """(N,): sum over each sample's group, in the dtype of the values."""
        return values_N.new_zeros(len(self.sizes_K)).index_add(0, self.index_N, values_N)[self.index_N]

    def mean(self, values_N: Tensor) -> Tensor:
        """(N,): mean over each sample's group, in the dtype of the values."""
        return self.sum(values_N) / self.size_N

    def max(self, values_N: Tensor) -> Tensor:
        """(N,): largest value of each sample's group."""
        zeros_K = values_N.new_zeros(len(self.sizes_K))
        return zeros_K.scatter_reduce(0, self.index_N, values_N, "amax", include_self=False)[self.index_N]

    def max_of_others(self, values_N: Tensor) -> Tensor:
        """(N,): largest value among the other samples of each sample's group; -inf for a group of one."""
        highest_N = self.max(values_N)
        is_highest_N = values_N == highest_N
        second_N = self.max(values_N.masked_fill(is_highest_N, -torch.inf))
        only_highest_N = is_highest_N & (self.sum(is_highest_N.long()) == 1)
        return torch.where(only_highest_N, second_N, highest_N)

    def unequal(self, values_N: Tensor) -> Tensor:
        """Boolean (N,): the sample's group has max > min; False for a group of one."""
        return self.max(values_N) > -self.max(-values_N)

    def centered(self, values_N: Tensor) -> Tensor:
        """fp64 (N,): value minus mean of its group; exactly 0 where the group is equal or has one sample."""
        values = values_N.double()
        return (values - self.mean(values)).masked_fill(~self.unequal(raised(values_N)), 0.0)

    def std(self, centered_N: Tensor) -> Tensor:
        """(N,): unbiased (n - 1) standard deviation of each sample's group, from :meth:`centered` values."""
        return (self.sum(centered_N.square()) / (self.size_N - 1).clamp(min=1)).sqrt()
