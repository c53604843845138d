"""Dynamic sampling: informative groups are collected over generation rounds until they fill a batch.

A group whose samples all scored the same has advantage 0. It costs its rollouts, its forward and its share of the
denominator, and trains nothing. Such groups are set aside and the same policy samples for more prompts until the batch
is full (DAPO, arXiv 2503.14476). Each further batch of the data loader is one round, so that data order and resume need
nothing new.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from rllava_pl.checkpoint.codec import Plain, decode, encode
from rllava_pl.distributed.collectives import gather_objects, max_over_ranks, rank
from rllava_pl.functional.rewards import informative_groups
from rllava_pl.loop.batch import join, masked_out
from rllava_pl.loop.options import DynamicSampling
from rllava_pl.types import ScoredBatch

log = logging.getLogger(__name__)


class GroupBuffer:
    """The groups of a batch that is not full yet.

    Args:
        options: Rounds, and what makes a batch full.
    """

    def __init__(self, options: DynamicSampling) -> None:
        self.options = options
        self.parts: list[ScoredBatch] = []
        self.extra_rounds = 0
        """Rounds beyond the first that the last full batch took."""

    @property
    def rounds(self) -> int:
        """Generation rounds in the buffer."""
        return len(self.parts)

    def informative(self, batch: ScoredBatch) -> Tensor:
        """Bool (N,): the row's group has samples of different scores, in the component that decides."""
        if not self.options.max_rounds:
            return informative_groups(batch.scores_N, batch.group_N)
        if self.options.component not in batch.components:
            raise ValueError(
                f"dynamic_sampling.component is {self.options.component!r}; "
                f"the rewards have {', '.join(batch.components)}"
            )
        return informative_groups(batch.components[self.options.component].nan_to_num(0.0), batch.group_N)

    def add(self, batch: ScoredBatch, wanted: int) -> ScoredBatch | None:
        """Add a round; returns a batch of ``wanted`` groups once every rank has them or the rounds are used up."""
        if not self.options.max_rounds:
            return batch
        self.parts.append(batch)
        everything = join(self.parts)
        informative_N = self.informative(everything) & everything.trained_mask_NT.any(1)
        chosen = everything.by_prompt(informative_N).any(1).nonzero()[:, 0].tolist()
        lacking = torch.tensor(len(chosen) < math.ceil(self.options.min_informative * wanted), dtype=torch.int64)
        short = bool(max_over_ranks(lacking.to(everything.scores_N.device)))
        if short and self.rounds <= self.options.max_rounds:
            return None
        if short:
            log.warning(
                "%d of %d wanted groups are informative after %d rounds of generation; continuing with them",
                min(len(chosen), wanted), wanted, self.rounds,
            )  # fmt: skip
        self.extra_rounds = self.rounds - 1
        self.parts = []
        chosen = chosen[:wanted]
        if self.options.min_informative < 1:
            others = [p for p in range(len(everything.inputs)) if p not in set(chosen)]
            chosen = sorted(chosen + others[: wanted - len(chosen)])
        return everything.select(chosen) if chosen else masked_out(everything.select([0]))

    def state(self) -> list[Plain]:
        """The rounds of every rank as plain data, for a checkpoint. Collective."""
        own: Plain = {str(k): encode(part) for k, part in enumerate(self.parts)}
        return gather_objects(own)

    def restore(self, saved: list[Plain]) -> None:
        """Take back what ``state`` returned; another number of ranks starts with an empty buffer and says so."""
        rounds = [cast("Mapping[str, Plain]", part) for part in saved]
        everyone = gather_objects(rank())
        if any(rounds) and len(rounds) != len(everyone):
            log.warning(
                "the checkpoint was saved by %d ranks while a batch was being filled, this run has %d: the %d rounds "
                "in the group buffer are dropped and sampled again with the next prompts",
                len(rounds), len(everyone), max(map(len, rounds)),
            )  # fmt: skip
            rounds = []
        own = rounds[rank()] if any(rounds) else {}
        self.parts = [cast(ScoredBatch, decode(own[str(k)])) for k in range(len(own))]

    def snapshot(self) -> list[ScoredBatch]:
        """This moment, for ``rollback``."""
        return [*self.parts]

    def rollback(self, snapshot: list[ScoredBatch]) -> None:
        """Forget what was added since the snapshot."""
        self.parts = [*snapshot]
