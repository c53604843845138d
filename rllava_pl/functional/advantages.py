"""From rewards to advantages: how much better a sample was than what the policy does on that prompt anyway.

Every function takes the rollout batch gathered from all ranks. Statistics are taken in fp64: in fp32, fifteen equal
rewards of 0.98 would get an advantage of 0.19 instead of 0. A group of one, and a group of equal rewards, carry no
information and get exactly 0; a raw reward never becomes an advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import raised


def grpo(rewards_N: Tensor, group_N: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages: ``(r - mean_g) / (std_g + eps)``, std unbiased (n - 1).

    GRPO (arXiv 2402.03300); without the division Dr. GRPO (arXiv 2503.20783), which does not favour groups that are
    almost solved or almost hopeless.

    Args:
        rewards_N: One reward a sample.
        group_N: int64; equal for samples of one prompt instance. Ids are arbitrary, groups may be unequal.
        scale_by_std: Divide by the standard deviation of the group.
        eps: Added to the standard deviation.

    Returns:
        (N,), in at least fp32.

    Raises:
        ValueError: the two are not vectors of one length.

    >>> grpo(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([7, 7, 7, 7]), scale_by_std=False)
    tensor([-0.2500, -0.2500, -0.2500,  0.7500])
    """
    groups = Groups.of(group_N, rewards_N)
    advantages_N = groups.centered(rewards_N)
    if scale_by_std:
        advantages_N = advantages_N / (groups.std(advantages_N) + eps)
    return advantages_N.to(raised(rewards_N).dtype)


def rloo(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Leave-one-out advantages: reward minus the mean of the group's other samples, ``n / (n - 1) * (r - mean_g)``.

    RLOO (arXiv 2402.14740). The baseline leaves the sample itself out, so it does not bias the gradient.

    Args:
        rewards_N: One reward a sample.
        group_N: int64; equal for samples of one prompt instance. n is the size of the sample's own group.

    Returns:
        (N,), in at least fp32.

    Raises:
        ValueError: the two are not vectors of one length.

    >>> rloo(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 0]))
    tensor([ 0.7500, -0.7500,  0.0000])
    """
    groups = Groups.of(group_N, rewards_N)
    size_N = groups.size_N.to(torch.float64)
    return (groups.centered(rewards_N) * size_N / (size_N - 1).clamp(min=1)).to(raised(rewards_N).dtype)
