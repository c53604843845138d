"""Rewards on their way to advantages: where they stand in time, and which of them can teach something."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import check_mask, raised


def place_rewards(rewards_N: Tensor, mask_NT: Tensor) -> Tensor:
    """Put the reward of each sample on its last trainable token.

    Args:
        rewards_N: One reward a sample.
        mask_NT: bool, True at trainable tokens.

    Returns:
        (N, T), 0 everywhere else; a row without trainable tokens is all 0.

    Raises:
        ValueError: ``mask_NT`` is not boolean, or not one row a reward.

    >>> import torch
    >>> place_rewards(torch.tensor([1.0, 2.0]), torch.tensor([[True, False, True, False], [False] * 4]))
    tensor([[0., 0., 1., 0.],
            [0., 0., 0., 0.]])
    """
    check_mask(mask_NT, mask_NT)
    if rewards_N.ndim != 1 or mask_NT.ndim != 2 or len(rewards_N) != len(mask_NT):
        raise ValueError(
            f"rewards have shape {tuple(rewards_N.shape)}, mask {tuple(mask_NT.shape)}; they must be (N,) and (N, T)"
        )
    remaining_NT = mask_NT.flip(1).cumsum(1).flip(1)
    return raised(rewards_N).unsqueeze(1).where(mask_NT & (remaining_NT == 1), 0.0)


def informative_groups(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Samples whose group has unequal rewards: all that a group-relative advantage can learn from.

    Args:
        rewards_N: One reward a sample, before shaping.
        group_N: int64; equal for samples of one prompt instance.

    Returns:
        bool (N,): True where the sample's group has max > min; False for groups of one.

    Raises:
        ValueError: the two are not vectors of one length.

    >>> import torch
    >>> informative_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([5, 5, 2, 2]))
    tensor([ True,  True, False, False])
    """
    return Groups.of(group_N, rewards_N).unequal(raised(rewards_N))
