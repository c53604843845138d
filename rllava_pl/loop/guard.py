"""Numbers that are not finite: which samples of a skipped update they belong to, and when the run stops."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rllava_pl.checkpoint.codec import Plain, decode, encode
from rllava_pl.distributed.collectives import max_over_ranks
from rllava_pl.types import PolicyOutput, ScoredBatch, TrainingBatch

log = logging.getLogger(__name__)

FIELDS = (
    *("engine_logp_NT", "scores_N", "old_logp_NT", "ref_logp_NT", "values_NT"),
    *("rewards_N", "token_rewards_NT", "returns_NT", "advantages_NT"),
)
"""Tensors behind an update in the order in which they are computed; finite everywhere, padding included."""

Suspects = dict[str, list[str]]
"""Names of samples, ``<uid>#<number in its group>``, by the tensor that is not finite in them."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were skipped."""


def all_finite(minibatch: TrainingBatch, losses: Tensor, norm: Tensor) -> bool:
    """Whether everything behind an optimizer step is finite on all ranks; all get the same answer. One host transfer.

    A loss can hide what is not finite (a clamp has gradient 0 there) and a gradient can overflow behind a finite loss,
    so all are checked: a sum is finite where all its terms are.
    """
    sums = [x.sum(dtype=torch.float64) for _, x in _tensors(minibatch)]
    total = torch.stack([norm.to(sums[0]), losses.sum(dtype=torch.float64), *sums]).sum()
    return not bool(max_over_ranks((~total.isfinite()).long()))


def find_suspects(
    minibatch: TrainingBatch, output: PolicyOutput, losses: Sequence[tuple[ScoredBatch, Tensor]]
) -> Suspects:
    """Samples in which a tensor of the mini-batch, a forward pass, or else the loss of a micro-batch is not finite."""
    found = {name: _samples(minibatch, x) for name, x in _tensors(minibatch)}
    found |= {name: _samples(minibatch, x) for name, x in output._asdict().items() if x is not None}
    if not any(found.values()):
        broken = {id(rollout) for part, loss in losses if not loss.isfinite().all() for rollout in part.rollouts}
        found["loss"] = [_name(minibatch, n) for n, rollout in enumerate(minibatch.rollouts) if id(rollout) in broken]
    return {name: samples for name, samples in found.items() if samples}


def describe(parts: Sequence[Suspects], most: int = 8) -> str:
    """``advantages of a#0, a#1; loss of b#0`` over all ranks."""
    names = dict.fromkeys(name for part in parts for name in part)
    merged = {name: [sample for part in parts for sample in part.get(name, [])] for name in names}
    return "; ".join(
        f"{name} of {', '.join(samples[:most])}" + (f" and {len(samples) - most} more" if len(samples) > most else "")
        for name, samples in merged.items()
    )


def save_batch(batch: ScoredBatch, path: Path) -> None:
    """Write a batch as plain tensors and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encode(batch), path)


def load_batch(path: Path | str) -> ScoredBatch:
    """Read what ``save_batch`` wrote; runs no code from the file.

    Raises:
        ValueError: The file holds something else.
    """
    plain: Plain = torch.load(path, weights_only=True)
    batch = decode(plain)
    if not isinstance(batch, ScoredBatch):
        raise ValueError(f"{path} holds no batch")
    return batch


def _tensors(batch: TrainingBatch) -> Iterator[tuple[str, Tensor]]:
    stored = {**vars(batch), **batch.computed}
    for name in FIELDS:
        if name in stored:
            yield name.removesuffix("_NT").removesuffix("_N"), stored[name]


def _samples(batch: ScoredBatch, x: Tensor) -> list[str]:
    """Names of the rows in which ``x`` is not finite."""
    rows = (~x.reshape(len(x), -1).isfinite()).any(1).nonzero()[:, 0].tolist()
    return [_name(batch, n) for n in rows]


def _name(batch: ScoredBatch, row: int) -> str:
    return f"{batch.rollouts[row].prompt.uid}#{row % batch.group_size}"
