"""Log-probs and entropies of tokens under the distribution they are sampled from.

That distribution is the softmax of logits / temperature over the allowed tokens; engine and trainer must use the
same one, hence temperature and bans are arguments here.

=============== ====================================================================================================
``ids_NT``      int64; at padding any id of the vocabulary. The caller shifts: logits or states at t predict the id at t
``temperature`` divides the logits; positive
``banned_ids``  ids that are never sampled
``entropy``     False skips the entropies; they are then 0
returned        ``(logp_NT, entropy_NT)`` in at least fp32, entropy in nats, both differentiable. A banned target has
                logp -100 and no gradient
raised          ValueError: an option out of its range, shapes that do not fit
=============== ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.functional._numerics import raised
from rllava_pl.functional._tiles import BANNED_LOGIT, TiledLogProbs, Tiling

BANNED_LOGP = -100.0
"""Log-prob reported for a target that can not be sampled, such as an image token inside an observation."""

TILE_COLUMNS = 2048
"""Tokens of the vocabulary in a tile: 2,048 rows of fp32 logits are then 16 MB (`benchmarks/logprobs.py`)."""


def token_log_probs(
    logits_NTV: Tensor,
    ids_NT: Tensor,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] | Tensor | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each given token and entropy of the distribution it was drawn from, from finite logits.

    With ``z = logits / temperature`` and banned columns at -inf: ``logp = z[id] - logsumexp(z)`` and
    ``entropy = -sum_v p_v * (z_v - logsumexp(z))``.

    >>> logp_NT, entropy_NT = token_log_probs(torch.tensor([[[1.0, 2.0, 5.0]]]).log(), torch.tensor([[1]]))
    >>> round(logp_NT.item(), 4), round(entropy_NT.item(), 4)  # ln(2 / 8)
    (-1.3863, 0.9003)
    """
    _check_temperature(temperature)
    if logits_NTV.shape[:-1] != ids_NT.shape:
        raise ValueError(
            f"logits have shape {tuple(logits_NTV.shape)}, ids {tuple(ids_NT.shape)}; they must be (N, T, V) and (N, T)"
        )
    scaled_NTV = raised(logits_NTV) if temperature == 1.0 else raised(logits_NTV) / temperature
    banned = _as_index(banned_ids, ids_NT.device)
    if banned is not None:
        scaled_NTV = scaled_NTV.index_fill(-1, banned, BANNED_LOGIT)
    logp_NTV = scaled_NTV.log_softmax(-1)
    logp_NT = logp_NTV.gather(-1, ids_NT.unsqueeze(-1)).squeeze(-1)
    # Not lse - sum(p * z): for logits of standard deviation 150 that loses two digits more to cancellation.
    entropy_NT = -(logp_NTV.exp() * logp_NTV).sum(-1) if entropy else torch.zeros_like(logp_NT)
    if banned is not None:
        logp_NT = logp_NT.masked_fill(torch.isin(ids_NT, banned), BANNED_LOGP)
    return logp_NT, entropy_NT


def chunked_token_log_probs(
    hidden_NTH: Tensor,
    head_weight_VH: Tensor,
    ids_NT: Tensor,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] | Tensor | None = None,
    chunk_tokens: int = 256,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`token_log_probs` of ``hidden @ head.T`` without ever holding N * T * V logits.

    The vocabulary is processed in tiles, all rows at once, and the backward recomputes each tile's probabilities
    (``_tiles.py``): memory does not grow with the vocabulary, at the cost of one more multiplication with the head. A
    head without gradient needs no second pass, and an entropy without gradient costs nothing in the backward. Heads
    with a bias, a logit scale or a soft-cap do not fit; give their logits to :func:`token_log_probs`.

    Last hidden states in half precision give logits of half precision; everything behind them is in fp32. Gradients
    reach the hidden states and the weight of the head.

    Options:
        chunk_tokens: A tile has at most as many logits as this many tokens have in all, ``chunk_tokens * V``.

    >>> head_weight_VH = torch.tensor([[1.0, 2.0, 5.0]]).log().T
    >>> logp_NT, entropy_NT = chunked_token_log_probs(torch.ones(1, 1, 1), head_weight_VH, torch.tensor([[1]]))
    >>> round(logp_NT.item(), 4), round(entropy_NT.item(), 4)
    (-1.3863, 0.9003)
    """
    _check_temperature(temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; a tile needs the logits of at least 1 token")
    if hidden_NTH.shape[:-1] != ids_NT.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden_NTH.shape)}, ids {tuple(ids_NT.shape)}; they must be (N, T, H) and (N, T)"
        )
    device = hidden_NTH.device.type
    if torch.is_autocast_enabled(device):
        hidden_NTH = hidden_NTH.to(torch.get_autocast_dtype(device))
    banned = _as_index(banned_ids, ids_NT.device)
    columns = min(TILE_COLUMNS, max(1, chunk_tokens * len(head_weight_VH) // max(1, ids_NT.numel())))
    tiling = Tiling(temperature, () if banned is None else tuple(banned.tolist()), columns)
    frozen = torch.is_grad_enabled() and hidden_NTH.requires_grad and not head_weight_VH.requires_grad
    with torch.autocast(device, enabled=False):
        rows = (hidden_NTH.flatten(0, -2), head_weight_VH, ids_NT.flatten())
        logp_M, entropy_M = TiledLogProbs.apply(*rows, tiling, frozen, entropy)  # type: ignore[no-untyped-call]
    logp_NT, entropy_NT = logp_M.view(ids_NT.shape), entropy_M.view(ids_NT.shape)
    if banned is not None:
        logp_NT = logp_NT.masked_fill(torch.isin(ids_NT, banned), BANNED_LOGP)
    return logp_NT, entropy_NT


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; it must be positive (greedy sampling has no log-probs to train on)"
        )


def _as_index(banned_ids: Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    """``banned_ids`` as an int64 vector on ``device``; None if nothing is banned."""
    if banned_ids is None or len(banned_ids) == 0:
        return None
    return torch.as_tensor(banned_ids, dtype=torch.int64, device=device)
