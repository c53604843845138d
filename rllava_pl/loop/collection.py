"""Dynamic sampling: groups that can teach something are collected until they fill a batch.

A group whose answers all earned the same reward has advantage 0. It costs its rollouts, its forward and its share of
the denominator and teaches nothing. So such groups are set aside and more prompts are asked, by the same policy, until
the batch is full (DAPO, arXiv 2503.14476). Each further batch of the data loader is one such round, so that data order
and resume need nothing new.
"""

from __future__ import annotations

import logging
import math
from typing import cast

import torch
from torch import Tensor

from rllava_pl.checkpoint.codec import Archive, Plain
from rllava_pl.distributed.collectives import gather_objects, max_over_ranks, world_size
from rllava_pl.functional.rewards import informative_groups
from rllava_pl.loop.experience import join, silenced
from rllava_pl.types import Experience

log = logging.getLogger(__name__)


class Collection:
    """The groups of a batch that is not full yet.

    Args:
        max_refills: Further rounds after the first; 0 takes every first round as it is.
        informative_share: The part of a batch that must be informative for it to be full; what is missing to the
            whole is filled with other groups.
        component: The reward component that decides, before any shaping.
    """

    def __init__(self, max_refills: int, informative_share: float, component: str) -> None:
        if max_refills < 0:
            raise ValueError(f"max_refills is {max_refills}; use 0 to take every batch as it is")
        if not 0 < informative_share <= 1:
            raise ValueError(f"informative_share is {informative_share}; it is a part of the batch, above 0, at most 1")
        self.max_refills = max_refills
        self.informative_share = informative_share
        self.component = component
        self.parts: list[Experience] = []

    @property
    def rounds(self) -> int:
        """Generation rounds in the collection so far."""
        return len(self.parts)

    def informative(self, experience: Experience) -> Tensor:
        """Bool (N,): the sample's group is worth training on.

        Raises:
            ValueError: The component that decides is none of the rewards'.
        """
        if not self.max_refills:
            return informative_groups(experience.rewards_N, experience.group_N)
        if self.component not in experience.components:
            raise ValueError(
                f"informative_component is {self.component!r}; the rewards have {', '.join(experience.components)}"
            )
        return informative_groups(experience.components[self.component], experience.group_N)

    def add(self, experience: Experience, wanted: int) -> Experience | None:
        """Take in one round; returns the batch when it is full on every rank or the rounds are used up, else None.

        Args:
            experience: Of this round.
            wanted: Groups that make a full batch.
        """
        if not self.max_refills:
            return experience
        self.parts.append(experience)
        everything = join(self.parts)
        chosen = self._informative_prompts(everything)
        lacking = torch.tensor(len(chosen) < math.ceil(self.informative_share * wanted), dtype=torch.int64)
        short = bool(max_over_ranks(lacking.to(experience.mask_NT.device)))
        if short and self.rounds <= self.max_refills:
            return None
        if short:
            log.warning(
                "%d of %d wanted groups are informative after %d rounds of generation; going on with them",
                min(len(chosen), wanted), wanted, self.rounds,
            )  # fmt: skip
        self.parts = []
        return self._batch(everything, chosen, wanted)

    def _informative_prompts(self, experience: Experience) -> list[int]:
        rows_PG = (self.informative(experience) & experience.mask_NT.any(1)).unflatten(0, (-1, experience.group_size))
        return [int(p) for p in rows_PG.any(1).nonzero()[:, 0]]

    def _batch(self, everything: Experience, chosen: list[int], wanted: int) -> Experience:
        chosen = chosen[:wanted]
        if self.informative_share < 1:
            others = [p for p in range(len(everything.inputs)) if p not in set(chosen)]
            chosen = sorted(chosen + others[: wanted - len(chosen)])
        return everything.select(chosen) if chosen else silenced(everything.select([0]))

    def state(self) -> list[Plain]:
        """The rounds of every rank as plain data, for a checkpoint; collective."""
        own: Plain = {str(k): Archive().pack(part) for k, part in enumerate(self.parts)}
        return gather_objects(own)

    def restore(self, state: list[Plain], rank: int) -> None:
        """Take back what ``state`` gave.

        Raises:
            ValueError: The checkpoint was made on another number of ranks in the middle of a collection.
        """
        if any(state) and len(state) != world_size():
            raise ValueError(
                f"the checkpoint was saved by {len(state)} ranks while a batch was being collected, this run has "
                f"{world_size()}; continue on {len(state)} ranks, or from a checkpoint at a rollout boundary"
            )
        own = cast("dict[str, Plain]", state[rank]) if any(state) else {}
        archive = Archive()
        self.parts = [cast(Experience, archive.unpack(own[str(k)])) for k in range(len(own))]
