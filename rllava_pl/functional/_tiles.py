"""Log-probs over a large vocabulary, tile by tile, forward and backward.

With z = W·h / temperature over V tokens, p = softmax(z), E the entropy of p and y the target:

    log p(y) = z_y - norm                        d log p(y) / dz_v = 1[v = y] - p_v
    norm = log Σ_v exp(z_v)                      dE / dz_v = -p_v · (log p_v + E)

Each tile gives its share of everything but ``norm``, which comes from a maximum and a sum that are updated tile by tile
(online softmax, arXiv 1805.02867). The backward recomputes each tile's probabilities from z and ``norm``, which costs
one more multiplication with the head; what is saved in between does not grow with V. Where the head takes no
gradient (frozen, or LoRA elsewhere), d log p(y) / dh = (W_y - Σ_v p_v W_v) / temperature is summed up in the same
pass as ``norm``, and the backward is one multiplication by the upstream gradient.

A tile of fp32 logits for all rows at once should stay in the cache; then the head's weight is read once a pass, and its
gradient written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BANNED_LOGIT = -1e30
"""Probability exactly 0, as with -inf, but finite: p * log p and its gradient are then 0 instead of 0 * inf."""


@dataclass(frozen=True)
class Tiling:
    """The distribution over the vocabulary, and its tiles."""

    temperature: float
    banned_ids: tuple[int, ...]
    columns: int
    """Tokens of the vocabulary in one tile."""

    def logits(self, hidden_MH: Tensor, weight_VH: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token, weight (K, H) and scaled logits (M, K) in at least fp32 of every tile.

        All tiles are written into one buffer: what the loop's body leaves in it is overwritten.
        """
        vocabulary = weight_VH.shape[0]
        buffer = _like(hidden_MH, hidden_MH.shape[0], min(self.columns, vocabulary))
        for start in range(0, vocabulary, self.columns):
            weight_KH = weight_VH[start : start + self.columns].to(hidden_MH.dtype)
            stop = start + weight_KH.shape[0]
            z_MK = buffer[:, : stop - start]
            if z_MK.dtype == hidden_MH.dtype:
                torch.mm(hidden_MH, weight_KH.T, out=z_MK)
            else:
                z_MK.copy_(hidden_MH @ weight_KH.T)
            if self.temperature != 1.0:
                z_MK.div_(self.temperature)
            if banned := [i - start for i in self.banned_ids if start <= i < stop]:
                z_MK[:, banned] = BANNED_LOGIT
            yield start, weight_KH, z_MK


class OnlineSoftmax:
    """Sums over the tiles seen so far, all relative to the largest logit ``top``, which may rise with every tile.

    Args:
        hidden_MH: Gives rows, precision and device.
        columns: Tokens of the widest tile.
        entropy: Also sum up what the entropy needs.
        with_mean: Also sum up the head's rows, weighted by probability.
    """

    def __init__(self, hidden_MH: Tensor, columns: int, *, entropy: bool, with_mean: bool) -> None:
        self.top_M = _like(hidden_MH, len(hidden_MH)).fill_(BANNED_LOGIT)
        self.mass_M = torch.zeros_like(self.top_M)  # sum of exp(z - top)
        self.surprise_M = torch.zeros_like(self.top_M)  # sum of exp(z - top) (z - top)
        self.mean_MH = _like(hidden_MH, *hidden_MH.shape).zero_() if with_mean else None  # sum of exp(z - top) W
        self._scratch = _like(hidden_MH, len(hidden_MH), columns) if entropy else None

    def add(self, z_MK: Tensor, weight_KH: Tensor) -> None:
        """Add a tile; its logits are overwritten."""
        top_M = torch.maximum(self.top_M, z_MK.amax(1))
        drop_M = self.top_M - top_M
        shrink_M = drop_M.exp()
        z_MK.sub_(top_M[:, None])
        if self._scratch is None:
            p_MK = z_MK.exp_()
        else:
            p_MK = torch.exp(z_MK, out=self._scratch[:, : z_MK.shape[1]])
            self.surprise_M = shrink_M * (self.surprise_M + drop_M * self.mass_M) + z_MK.mul_(p_MK).sum(1)
        self.mass_M = shrink_M * self.mass_M + p_MK.sum(1)
        self.top_M = top_M
        if self.mean_MH is not None:
            _add_product(self.mean_MH.mul_(shrink_M[:, None]), p_MK, weight_KH)


class TiledLogProbs(torch.autograd.Function):
    """``(logp_M, entropy_M)`` of targets (M,) from hidden states (M, H) and the head's weight (V, H)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        ids_M: Tensor,
        tiling: Tiling,
        frozen: bool,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the vocabulary; ``frozen``: it also prepares the gradient of the hidden states."""
        sums = OnlineSoftmax(hidden_MH, min(tiling.columns, len(weight_VH)), entropy=entropy, with_mean=frozen)
        target_M = torch.zeros_like(sums.mass_M)
        for start, weight_KH, z_MK in tiling.logits(hidden_MH, weight_VH):
            index_M, inside_M = _targets(ids_M, start, z_MK.shape[1])
            target_M = torch.where(inside_M, z_MK.gather(1, index_M[:, None])[:, 0], target_M)
            sums.add(z_MK, weight_KH)
        log_mass_M = sums.mass_M.log()
        entropy_M = log_mass_M - sums.surprise_M / sums.mass_M if entropy else torch.zeros_like(log_mass_M)
        slope_MH = None
        if sums.mean_MH is not None:
            slope_MH = sums.mean_MH.div_(-sums.mass_M[:, None]).add_(weight_VH[ids_M]).div_(tiling.temperature)
        kept = (hidden_MH, weight_VH, ids_M, sums.top_M + log_mass_M, entropy_M, slope_MH)
        ctx.save_for_backward(*kept)  # type: ignore[arg-type]
        ctx.tiling = tiling  # type: ignore[attr-defined]
        if not entropy:
            ctx.mark_non_differentiable(entropy_M)
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs nothing in the backward
        return target_M - sums.top_M - log_mass_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, logp_grad_M: Tensor | None, entropy_grad_M: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """A second pass; none if the gradient was prepared and the entropy has no gradient."""
        hidden_MH, weight_VH, ids_M, norm_M, entropy_M, slope_MH = ctx.saved_tensors  # type: ignore[attr-defined]
        if logp_grad_M is None:
            logp_grad_M = torch.zeros_like(norm_M)
        if slope_MH is not None and entropy_grad_M is None:
            return (slope_MH * logp_grad_M[:, None]).to(hidden_MH.dtype), None, None, None, None, None
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        hidden_grad_MH = _like(hidden_MH, *hidden_MH.shape).zero_() if wants_hidden else None
        weight_grad_VH = torch.empty_like(weight_VH) if wants_weight else None
        tiling: Tiling = ctx.tiling  # type: ignore[attr-defined]
        with torch.autocast(hidden_MH.device.type, enabled=False):
            for start, weight_KH, z_MK in tiling.logits(hidden_MH, weight_VH):
                grad_MK = _logit_gradient(z_MK.sub_(norm_M[:, None]), logp_grad_M, entropy_grad_M, entropy_M)
                index_M, inside_M = _targets(ids_M, start, z_MK.shape[1])
                grad_MK.scatter_add_(1, index_M[:, None], (inside_M * logp_grad_M)[:, None])
                if tiling.temperature != 1.0:
                    grad_MK.div_(tiling.temperature)
                if hidden_grad_MH is not None:
                    _add_product(hidden_grad_MH, grad_MK, weight_KH)
                if weight_grad_VH is not None:
                    _write_product(weight_grad_VH[start : start + len(weight_KH)], grad_MK, hidden_MH)
        if hidden_grad_MH is not None:
            hidden_grad_MH = hidden_grad_MH.to(hidden_MH.dtype)
        return hidden_grad_MH, weight_grad_VH, None, None, None, None


def _like(hidden_MH: Tensor, *shape: int) -> Tensor:
    """Uninitialised, in the precision of the softmax: at least fp32."""
    dtype = torch.promote_types(hidden_MH.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=hidden_MH.device)


def _targets(ids_M: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target in the tile that begins at ``start``, and whether it is there at all."""
    index_M = ids_M - start
    return index_M.clamp(0, columns - 1), (index_M >= 0) & (index_M < columns)


def _logit_gradient(logp_MK: Tensor, logp_grad_M: Tensor, entropy_grad_M: Tensor | None, entropy_M: Tensor) -> Tensor:
    """Gradient of the logits except the target's term; written into ``logp_MK``."""
    if entropy_grad_M is None:
        return logp_MK.exp_().mul_(-logp_grad_M[:, None])
    p_MK = logp_MK.exp()
    weight_MK = logp_MK.add_(entropy_M[:, None]).mul_(entropy_grad_M[:, None]).add_(logp_grad_M[:, None])
    return weight_MK.mul_(p_MK).neg_()


def _add_product(total_MH: Tensor, factor_MK: Tensor, weight_KH: Tensor) -> None:
    """``total += factor @ weight``, summed in the precision of ``total``: rounding errors of the tiles would add up."""
    if weight_KH.dtype == total_MH.dtype or not total_MH.is_cuda:
        total_MH.addmm_(factor_MK, weight_KH.to(total_MH.dtype))
    else:
        low_MK = factor_MK.to(weight_KH.dtype)
        torch.addmm(total_MH, low_MK, weight_KH, out_dtype=total_MH.dtype, out=total_MH)


def _write_product(grad_KH: Tensor, factor_MK: Tensor, hidden_MH: Tensor) -> None:
    """``grad = factor.T @ hidden``: the whole sum over rows in one product, rounded once."""
    if grad_KH.dtype == hidden_MH.dtype == factor_MK.dtype:
        torch.mm(factor_MK.T, hidden_MH, out=grad_KH)
    elif grad_KH.is_cuda:
        grad_KH.copy_(factor_MK.to(hidden_MH.dtype).T @ hidden_MH)
    else:
        grad_KH.copy_(factor_MK.T @ hidden_MH.to(factor_MK.dtype))
