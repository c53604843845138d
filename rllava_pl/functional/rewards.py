"""Rewards before they become advantages: placed on tokens, penalised for length, and which groups are informative.

``rewards_N`` is one reward a sample, before shaping. Inputs that do not fit together, and options out of their range,
raise ValueError.
"""

from __future__ import annotations

import math

from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import check_mask, raised


def place_rewards(rewards_N: Tensor, mask_NT: Tensor) -> Tensor:
    """Put the reward of each sample on its last trainable token, and 0 on all others.

    ``mask_NT`` is bool (N, T), True at trainable tokens; a row without any is all 0.

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


def overlong_penalty(lengths_N: Tensor, *, max_tokens: int, buffer_tokens: int, scale: float = 1.0) -> Tensor:
    """Soft punishment of long responses: 0, and from ``max_tokens - buffer_tokens`` on linear down to ``-scale``.

    ``scale * ((max_tokens - buffer_tokens) - length) / buffer_tokens`` inside the buffer, ``-scale`` beyond
    ``max_tokens``. Soft overlong punishment of DAPO (arXiv 2503.14476), there with 20,480 tokens of which 4,096 are
    buffer. It shapes rewards and must not decide which groups are informative: filter first, then add it.

    Args:
        lengths_N: int64, trainable tokens of each sample.
        max_tokens: Response budget in tokens, positive.
        buffer_tokens: Last part of the budget; 0: only what is longer than the budget is punished.
        scale: Size of the full penalty, 0 or positive.

    Returns:
        fp32 (N,), between ``-scale`` and 0.

    >>> import torch
    >>> overlong_penalty(torch.tensor([6, 8, 10, 11]), max_tokens=10, buffer_tokens=4)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; the response budget must be at least 1 token")
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens is {buffer_tokens}; it is the last part of max_tokens={max_tokens} and must lie between 0 "
            f"and {max_tokens}"
        )
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be 0 or a positive finite number, the penalty is its negative")
    room_N = (max_tokens - buffer_tokens - lengths_N).double()
    # Lengths are whole numbers: without a buffer, one token too many is a full share already.
    return (scale * (room_N / max(buffer_tokens, 1)).clamp(-1, 0)).float()


def informative_groups(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Samples whose group has unequal rewards: all that a group-relative advantage can learn from.

    The result is bool (N,): True where the sample's group has max > min; False for groups of one. ``group_N``, int64,
    is equal for samples of one prompt instance.

    >>> import torch
    >>> informative_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([5, 5, 2, 2]))
    tensor([ True,  True, False, False])
    """
    return Groups.of(group_N, rewards_N).unequal(raised(rewards_N))
