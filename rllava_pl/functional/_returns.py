"""Advantages of every token, from returns; public through ``rllava_pl.functional.advantages``.

Only trainable tokens are time steps. Tokens of a tool or an environment between them are skipped: the return is carried
over them without a discount, and rewards and values there are ignored.

==================== ===============================================================================================
``rewards_N``        one reward a sample
``group_N``          int64; equal for samples of one prompt instance
``token_rewards_NT`` reward of every token
``values_NT``        the critic's value of the state in which each token was drawn
``mask_NT``          bool, True at trainable tokens
``gamma``            discount of one trainable token, 0 to 1
returned             (N, T), in at least fp32, 0 where masked, without gradient history
raised               ValueError: shapes that do not match, a mask that is not boolean, an option out of its range
==================== ===============================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import check_mask, raised
from rllava_pl.functional.reduce import masked_whiten


def reinforce_pp(token_rewards_NT: Tensor, mask_NT: Tensor, *, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Discounted returns ``R_t = r_t + gamma * R_next``, whitened over the trainable tokens of the whole batch.

    REINFORCE++ (arXiv 2501.03262), which needs neither a critic nor groups. Returns advantages, all 0 for a single
    trainable token, and returns.

    >>> rewards_NT = torch.tensor([[0.0, 5.0, 0.0, 1.0]])
    >>> advantages_NT, returns_NT = reinforce_pp(rewards_NT, torch.tensor([[True, False, True, True]]), gamma=0.5)
    >>> returns_NT
    tensor([[0.2500, 0.0000, 0.5000, 1.0000]])
    """
    _check_tokens("token_rewards_NT", token_rewards_NT, mask_NT)
    step_NT = _steps(mask_NT)
    returns = _discounted_sums(_gather(token_rewards_NT, step_NT), _discount("gamma", gamma, mask_NT))
    returns_NT, dtype = _spread(returns, step_NT), raised(token_rewards_NT).dtype
    return masked_whiten(returns_NT, mask_NT).to(dtype), returns_NT.to(dtype)


def reinforce_pp_baseline(rewards_N: Tensor, group_N: Tensor, mask_NT: Tensor) -> Tensor:
    """Group-centred rewards ``r - mean_g`` on every token, whitened over the trainable tokens of the whole batch.

    REINFORCE++ with baseline (arXiv 2501.03262): the scale comes from the batch, not from the few samples of a group.
    A group of one, or of equal rewards, enters the whitening with 0.

    >>> mask_NT = torch.tensor([[True, True], [True, True], [True, False]])
    >>> reinforce_pp_baseline(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 1]), mask_NT)
    tensor([[ 1.,  1.],
            [-1., -1.],
            [ 0.,  0.]])
    """
    groups = Groups.of(group_N, rewards_N)
    if mask_NT.ndim != 2 or len(mask_NT) != len(rewards_N):
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)}, mask_NT {tuple(mask_NT.shape)}; "
            "they must be (N,) and (N, T)"
        )
    centered_NT = groups.centered(rewards_N).unsqueeze(1).expand(mask_NT.shape)
    return masked_whiten(centered_NT, mask_NT).to(raised(rewards_N).dtype)


def gae(
    token_rewards_NT: Tensor,
    values_NT: Tensor,
    mask_NT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: ``A_t = delta_t + gamma * lam * A_next``.

    ``delta_t = r_t + gamma * V_next - V_t``, with V and A of 0 after the last trainable token: the end of a response,
    cut off or not, is the end of the episode (arXiv 1506.02438). ``lam=1`` is the return minus the value, ``lam=0`` the
    error of one step. Returns advantages and returns ``A + V``: targets of the critic, from A before it is whitened.

    Options:
        lam: Share of the longer returns, 0 to 1; a tensor (N,) gives every sample its own.
        whiten: Whiten the advantages over the trainable tokens of the whole batch.

    >>> rewards_NT, values_NT = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.9, 0.25]])
    >>> gae(rewards_NT, values_NT, torch.tensor([[True, False, True]]), lam=0.0, whiten=False)
    (tensor([[-0.2500,  0.0000,  0.7500]]), tensor([[0.2500, 0.0000, 1.0000]]))
    """
    _check_tokens("token_rewards_NT", token_rewards_NT, mask_NT)
    _check_tokens("values_NT", values_NT, mask_NT)
    discount, step_NT = _discount("gamma", gamma, mask_NT), _steps(mask_NT)
    values = _gather(values_NT, step_NT)
    delta = _gather(token_rewards_NT, step_NT) + discount * pad(values[:, 1:], (0, 1)) - values
    advantages = _discounted_sums(delta, discount * _discount("lam", lam, mask_NT))
    advantages_NT, returns_NT = _spread(advantages, step_NT), _spread(advantages + values, step_NT)
    if whiten:
        advantages_NT = masked_whiten(advantages_NT, mask_NT)
    dtype = raised(token_rewards_NT).dtype
    return advantages_NT.to(dtype), returns_NT.to(dtype)


def _steps(mask_NT: Tensor) -> Tensor:
    """int64 (N, T): number of trainable tokens before this one in its row; T for a token that is not trainable."""
    return (mask_NT.cumsum(1) - 1).masked_fill(~mask_NT, mask_NT.shape[1])


def _gather(values_NT: Tensor, step_NT: Tensor) -> Tensor:
    """fp64 (N, T) without gradient: the values of the trainable tokens moved to the front of their row, then 0.

    Values of all other tokens are written to column T, which is dropped.
    """
    rows, tokens = step_NT.shape
    front = values_NT.new_zeros((rows, tokens + 1), dtype=torch.float64)
    return front.scatter(1, step_NT, values_NT.detach().double())[:, :tokens]


def _spread(front_NT: Tensor, step_NT: Tensor) -> Tensor:
    """(N, T): the reverse of :func:`_gather`; 0 at tokens that are not trainable."""
    return pad(front_NT, (0, 1)).gather(1, step_NT)


def _discounted_sums(values_NT: Tensor, discount: Tensor) -> Tensor:
    """(N, T): ``y_t = v_t + discount * y_(t+1)`` by doubling, in log2(T) steps instead of a loop over the tokens.

    With the sum over the next ``reach`` tokens known at every token, the sum over ``2 * reach`` of them is
    ``y_t + discount^reach * y_(t+reach)``.
    """
    sums_NT, reach = values_NT, 1
    while reach < values_NT.shape[1]:
        sums_NT = sums_NT + discount**reach * pad(sums_NT[:, reach:], (0, reach))
        reach *= 2
    return sums_NT


def _discount(name: str, value: float | Tensor, mask_NT: Tensor) -> Tensor:
    """fp64 discount on the device of the mask: one number as (), one a sample as (N, 1)."""
    discount = torch.as_tensor(value, dtype=torch.float64, device=mask_NT.device)
    if discount.ndim > 0 and discount.shape != mask_NT.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(discount.shape)}; it must be a number or ({len(mask_NT)},), one a sample"
        )
    outside = discount[~((discount >= 0) & (discount <= 1))]
    if len(outside):
        raise ValueError(f"{name} holds {outside[0].item()}; it must lie between 0 and 1")
    return discount.unsqueeze(1) if discount.ndim else discount


def _check_tokens(name: str, values_NT: Tensor, mask_NT: Tensor) -> None:
    """Raise ``ValueError`` unless the values are (N, T) and the mask is boolean and of the same shape."""
    check_mask(mask_NT, mask_NT)
    if values_NT.ndim != 2 or values_NT.shape != mask_NT.shape:
        raise ValueError(
            f"{name} has shape {tuple(values_NT.shape)}, mask_NT {tuple(mask_NT.shape)}; both must be (N, T)"
        )
