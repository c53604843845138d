"""Rollouts and scores to experience, and experience to mini-batches and micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.rewards.base import Judgement
from rllava_pl.strategies.collectives import max_over_ranks, row_gatherer
from rllava_pl.types import Experience, Rollout

log = logging.getLogger(__name__)


def assemble(rollouts: Sequence[Rollout], judgement: Judgement, group_size: int, device: torch.device) -> Experience:
    """Padded tensors of all groups whose every sample was scored.

    A group with an unscored sample is left out whole: a baseline over the rest would be of another size, and a made-up
    reward would be learnt from. If nothing is left, one group stays with an empty mask, so that this rank can still
    take part in every collective call.
    """
    experience = _pad(rollouts, judgement, group_size, device)
    if all(reward is not None for reward in judgement.rewards):
        return experience
    groups = range(len(rollouts) // group_size)
    unscored = {row // group_size for row, reward in enumerate(judgement.rewards) if reward is None}
    kept = [p for p in groups if p not in unscored]
    log.warning("%d of %d groups dropped, unscored samples: %s", len(unscored), len(groups), dict(judgement.causes))
    return experience.select(kept) if kept else silenced(experience.select([0]))


def _pad(rollouts: Sequence[Rollout], judgement: Judgement, group_size: int, device: torch.device) -> Experience:
    pad = torch.nn.utils.rnn.pad_sequence
    rewards = [float("nan") if reward is None else reward for reward in judgement.rewards]
    return Experience(
        rollouts=tuple(rollouts),
        inputs=tuple(rollout.inputs for rollout in rollouts[::group_size]),
        group_size=group_size,
        group_N=torch.tensor([rollout.group for rollout in rollouts], device=device),
        response_ids_NT=pad([rollout.response_ids for rollout in rollouts], batch_first=True).to(device),
        mask_NT=pad([rollout.response_mask for rollout in rollouts], batch_first=True).to(device),
        engine_logp_NT=pad([rollout.engine_logprobs for rollout in rollouts], batch_first=True).to(device),
        rewards_N=torch.tensor(rewards, dtype=torch.float32, device=device),
        components={k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in judgement.components.items()},
    )


def silenced(experience: Experience) -> Experience:
    """The same with nothing to train: it weighs nothing in any loss, but can be sent through the model."""
    return experience.replace(
        mask_NT=torch.zeros_like(experience.mask_NT), rewards_N=torch.zeros_like(experience.rewards_N)
    )


def over_ranks(experience: Experience) -> tuple[Experience, slice]:
    """The tensors of all ranks' experience in rank order, and which rows are this rank's.

    Statistics of rewards belong to the whole rollout batch. Rollouts and inputs stay those of this rank.
    """
    gather, own = row_gatherer(len(experience), experience.mask_NT.device)
    return experience.map(gather), own


def minibatches(experience: Experience, parts: int, order: Sequence[int]) -> list[Experience]:
    """``parts`` mini-batches of whole groups, as equal as possible, prompts taken in ``order``.

    A part without prompts (groups were dropped) is silenced, so that every rank makes the same number of updates.
    """
    cuts = torch.tensor(order).tensor_split(parts)
    return [experience.select(part.tolist()) if len(part) else silenced(experience.select([0])) for part in cuts]


def microbatches(experience: Experience, size: int) -> list[Experience]:
    """Pieces of at most ``size`` samples for one forward and backward each, the same number of them on every rank.

    Whole groups as long as they fit, since a group shares its prompt; else equal parts of a group, which is exact but
    computes the prompt once a part. ``size`` 0 takes everything at once.
    """
    group, prompts = experience.group_size, len(experience.inputs)
    if size == 0 or size >= len(experience):
        pieces = [experience]
    elif size >= group:
        step = size // group
        pieces = [experience.select(range(p, min(p + step, prompts))) for p in range(0, prompts, step)]
    else:
        members = [range(g, g + size) for g in range(0, group, size)]
        pieces = [experience.select([p], part) for p in range(prompts) for part in members]
    missing = int(max_over_ranks(torch.tensor(len(pieces), device=experience.mask_NT.device))) - len(pieces)
    return pieces + [silenced(pieces[0])] * missing


def join_rows(pieces: Sequence[Tensor], width: int) -> Tensor:
    """Per-token tensors of consecutive micro-batches, each as wide as its longest response, as one (N, width)."""
    return torch.cat([torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces])
