"""Numbers that are not finite: the update is left out on all ranks together, and what caused it is named."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rllava_pl.checkpoint.codec import Archive, Plain
from rllava_pl.distributed.collectives import gather_objects, max_over_ranks, rank, world_size
from rllava_pl.loop.recovery import Done, Recovery
from rllava_pl.types import Experience

log = logging.getLogger(__name__)

FIELDS = (
    "engine_logp_NT",
    "rewards_N",
    "old_logp_NT",
    "ref_logp_NT",
    "values_NT",
    "token_rewards_NT",
    "returns_NT",
    "advantages_NT",
)
"""What an update is made of, in the order in which it comes about; finite everywhere, padding included."""

Suspects = dict[str, list[str]]
"""Names of samples, ``<uid>#<number in its group>``, by what is not finite in them."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were left out."""


class Guard(Recovery):
    """Keeps what is not finite away from weights and optimizer of ``RLModule``."""

    def is_finite(self, minibatch: Experience, losses: Sequence[Done[Tensor]], norm: Tensor) -> bool:
        """Whether everything behind the step is finite on all ranks; all get the same answer. One host transfer.

        A loss can hide what is not finite (a clamp has gradient 0 there) and a gradient can overflow behind a finite
        loss, so all are looked at: a sum is finite where all its terms are.
        """
        parts = [x.sum(dtype=torch.float64) for _, x in _tensors(minibatch)]
        total = torch.stack([norm.to(parts[0]), *(loss.result.double() for loss in losses), *parts]).sum()
        return not bool(max_over_ranks((~total.isfinite()).long()))

    def leave_out(self, minibatch: Experience, losses: Sequence[Done[Tensor]]) -> None:
        """Count an update that was not made, name the samples behind it, and stop after too many. Collective.

        Raises:
            NonFiniteError: ``max_skipped`` updates in a row were left out; the mini-batch is on disk.
        """
        self.tally.undo()  # the means of this update's tokens would not be finite either
        self.tally.add_total("skipped_nonfinite", torch.ones_like(losses[0].result) / world_size())
        self.skipped_in_a_row += 1
        found = _merged(gather_objects(self._suspects(minibatch, losses)))
        what = "; ".join(f"{name} of {_some(samples)}" for name, samples in found.items())
        told = f"rollout {self.rollout_index}: an update was left out, not finite: {what or 'the gradient alone'}"
        log.warning(told)
        if self.skipped_in_a_row >= self.max_skipped:
            path = Path(self.trainer.default_root_dir) / f"nonfinite-{self.rollout_index:06d}-rank-{rank()}.pt"
            save(minibatch, path)
            raise NonFiniteError(f"{told}. It is number {self.skipped_in_a_row} in a row; its mini-batch is in {path}")

    def _suspects(self, minibatch: Experience, losses: Sequence[Done[Tensor]]) -> Suspects:
        """A second look: at the tensors of the mini-batch, then at a forward pass, then at each micro-batch's loss."""
        found = {name: _samples(minibatch, x) for name, x in _tensors(minibatch)}
        output = self.score(self.trainer.strategy.model, minibatch)
        found |= {name: _samples(minibatch, x) for name, x in output._asdict().items() if x is not None}
        if not any(found.values()):
            rows = [(done.piece, done.result.expand(len(done.piece))) for done in losses]
            found["loss"] = [sample for piece, loss_N in rows for sample in _samples(piece, loss_N)]
        return {name: samples for name, samples in found.items() if samples}


def save(experience: Experience, path: Path) -> None:
    """Write an experience as plain tensors and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(Archive().pack(experience), path)


def load(path: Path | str) -> Experience:
    """What ``save`` wrote; runs no code of the file's.

    Raises:
        ValueError: The file holds something else.
    """
    plain: Plain = torch.load(path, weights_only=True)
    experience = Archive().unpack(plain)
    if not isinstance(experience, Experience):
        raise ValueError(f"{path} holds no experience")
    return experience


def _tensors(experience: Experience) -> Iterator[tuple[str, Tensor]]:
    for name in FIELDS:
        if (x := cast("Tensor | None", getattr(experience, name))) is not None:
            yield name.removesuffix("_NT").removesuffix("_N"), x


def _samples(experience: Experience, x: Tensor) -> list[str]:
    """Names of the rows in which ``x`` is not finite."""
    rows = (~x.reshape(len(x), -1).isfinite()).any(1).nonzero()[:, 0].tolist()
    return [f"{experience.rollouts[n].prompt.uid}#{n % experience.group_size}" for n in rows]


def _merged(parts: Sequence[Suspects]) -> Suspects:
    """What all ranks found, with the names of all of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [sample for part in parts for sample in part.get(name, [])] for name in names}


def _some(samples: Sequence[str], most: int = 8) -> str:
    return ", ".join(samples[:most]) + (f" and {len(samples) - most} more" if len(samples) > most else "")
