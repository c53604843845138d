"""Rollouts and scores to experience, and experience to mini-batches and micro-batches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, row_gatherer
from rllava_pl.rewards.output import Judgement
from rllava_pl.types import Experience, Rollout

log = logging.getLogger(__name__)


def assemble(rollouts: Sequence[Rollout], judgement: Judgement, group_size: int, device: torch.device) -> Experience:
    """Padded tensors of all groups whose every sample was scored; ``group_size`` rollouts to a prompt.

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
        demo_mask_NT=pad([_demo_mask(rollout) for rollout in rollouts], batch_first=True).to(device),
        engine_logp_NT=pad([rollout.engine_logprobs for rollout in rollouts], batch_first=True).to(device),
        rewards_N=torch.tensor(rewards, dtype=torch.float32, device=device),
        components={k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in judgement.components.items()},
    )


def _demo_mask(rollout: Rollout) -> Tensor:
    return torch.zeros_like(rollout.response_mask) if rollout.demo_mask is None else rollout.demo_mask


def interleaved(samples: Sequence[Rollout], extras: Sequence[Rollout], group_size: int) -> list[Rollout]:
    """Each prompt's ``group_size`` samples, followed by its extra row."""
    groups = (samples[p * group_size : (p + 1) * group_size] for p in range(len(extras)))
    return [rollout for group, extra in zip(groups, extras, strict=True) for rollout in (*group, extra)]


def join(parts: Sequence[Experience]) -> Experience:
    """One experience of several, their prompts in order, all as wide as the widest; they must have the same fields."""
    width = max(part.mask_NT.shape[1] for part in parts)
    device = parts[-1].mask_NT.device  # those that a checkpoint held come back on the host

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        rows = [torch.nn.functional.pad(x, (0, width - x.shape[1])) if x.ndim == 2 else x for x in tensors]
        return torch.cat([row.to(device) for row in rows])

    names = [f.name for f in dataclasses.fields(Experience) if f.name.endswith(("_N", "_NT"))]
    components = {name: torch.cat([part.components[name].to(device) for part in parts]) for name in parts[0].components}
    return parts[0].replace(
        rollouts=tuple(rollout for part in parts for rollout in part.rollouts),
        inputs=tuple(inputs for part in parts for inputs in part.inputs),
        components=components,
        **{name: stacked(name) for name in names},
    )


def silenced(experience: Experience) -> Experience:
    """The same with nothing to train: it weighs nothing in any loss, but can be sent through the model."""
    nothing_NT = torch.zeros_like(experience.mask_NT)
    return experience.replace(
        mask_NT=nothing_NT, demo_mask_NT=nothing_NT, rewards_N=torch.zeros_like(experience.rewards_N)
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


def split(experience: Experience, size: int) -> list[Experience]:
    """Pieces of at most ``size`` samples for one forward each, nearly equal in tokens; 0 takes everything at once.

    Whole groups as long as they fit, since a group shares its prompt; else parts of a group, which is exact but
    computes the prompt once a part. Memory is that of the dearest piece, so long and short prompts are mixed: the order
    of prompts is not kept.
    """
    group, prompts = experience.group_size, len(experience.inputs)
    if size == 0 or size >= len(experience):
        return [experience]
    if size >= group:
        most = size // group
        return [experience.select(part) for part in balanced(row_tokens(experience), -(-prompts // most), most)]
    members = [range(g, min(g + size, group)) for g in range(0, group, size)]
    return [experience.select([p], part) for p in range(prompts) for part in members]


def row_tokens(experience: Experience) -> list[int]:
    """Tokens of every prompt with its responses, as they stand in a packed row."""
    group = experience.group_size
    responses = [len(rollout.response_ids) for rollout in experience.rollouts]
    return [len(x) + sum(responses[p * group : (p + 1) * group]) for p, x in enumerate(experience.inputs)]


def balanced(weights: Sequence[int], parts: int, most: int) -> list[list[int]]:
    """Positions of ``weights`` in ``parts`` of at most ``most``: the heaviest first, each to the lightest with room.

    >>> balanced([9, 1, 2, 8], parts=2, most=2)
    [[0, 1], [2, 3]]
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for position in sorted(range(len(weights)), key=lambda k: -weights[k]):
        room = (part for part in chosen if len(part) < most)
        min(room, key=lambda part: sum(weights[k] for k in part)).append(position)
    return [sorted(part) for part in chosen]


def microbatches(experience: Experience, size: int) -> list[Experience]:
    """The pieces of ``split`` for one forward and backward each, the same number of them on every rank."""
    pieces = split(experience, size)
    missing = int(max_over_ranks(torch.tensor(len(pieces), device=experience.mask_NT.device))) - len(pieces)
    return pieces + [silenced(pieces[0])] * missing


def numbered(experience: Experience) -> Experience:
    """The same with each sample's row for its group, to find the rows of its pieces again; for scoring alone."""
    return experience.replace(group_N=torch.arange(len(experience), device=experience.mask_NT.device))


def join_rows(tensors: Sequence[Tensor], pieces: Sequence[Experience], like_NT: Tensor) -> Tensor:
    """Per-token tensors of the pieces of a ``numbered`` experience, each as wide as its longest response, as (N, T)."""
    joined_NT = tensors[0].new_zeros(like_NT.shape)
    for x, piece in zip(tensors, pieces, strict=True):
        joined_NT[:, : x.shape[1]].index_add_(0, piece.group_N, x)  # what is only there to keep step adds 0
    return joined_NT
