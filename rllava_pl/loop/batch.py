"""Rollouts and scores as a batch of tensors; gathering a batch over ranks, joining and splitting it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import row_gatherer
from rllava_pl.functional.seeds import seed_from
from rllava_pl.rewards.output import RewardOutput
from rllava_pl.types import BatchT, Rollout, ScoredBatch

log = logging.getLogger(__name__)


def assemble(rollouts: Sequence[Rollout], output: RewardOutput, group_size: int, device: torch.device) -> ScoredBatch:
    """Padded tensors of all groups in which every sample has a score.

    A group with an unscored sample is dropped whole: a baseline over the rest would be of another size, and a made-up
    reward would be trained on. If no group is left, one stays with empty masks, so that this rank can still take part
    in every collective call. ``group_size`` counts all rows of a prompt.
    """
    segments = [segment for rollout in rollouts for segment in rollout.segments]
    segment_tokens = torch.tensor([len(segment) for segment in segments])
    row_tokens_N = torch.tensor([sum(map(len, rollout.segments)) for rollout in rollouts])
    occupied_NT = torch.arange(int(row_tokens_N.max())) < row_tokens_N[:, None]

    def padded(tokens: Tensor) -> Tensor:
        return tokens.new_zeros(occupied_NT.shape).masked_scatter(occupied_NT, tokens).to(device)

    def by_segment(values: list[bool]) -> Tensor:
        return padded(torch.tensor(values).repeat_interleave(segment_tokens))

    no_logp = torch.zeros(int(segment_tokens.max()))
    logp = [no_logp[: len(s)] if s.logprobs_T is None else s.logprobs_T for s in segments]
    scores = [float("nan") if reward is None else reward for reward in output.rewards]
    batch = ScoredBatch(
        rollouts=tuple(rollouts),
        inputs=tuple(rollout.inputs for rollout in rollouts[::group_size]),
        group_size=group_size,
        group_N=torch.tensor([r.group if r.in_baseline else ~r.group for r in rollouts], device=device),
        in_baseline_N=torch.tensor([rollout.in_baseline for rollout in rollouts], device=device),
        response_ids_NT=padded(torch.cat([segment.ids_T for segment in segments])),
        sampled_mask_NT=by_segment([segment.origin == "sampled" for segment in segments]),
        trained_mask_NT=by_segment([r.trained and s.origin != "observation" for r in rollouts for s in r.segments]),
        engine_logp_NT=padded(torch.cat(logp)),
        scores_N=torch.tensor(scores, dtype=torch.float32, device=device),
        components={k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in output.components.items()},
    )
    unscored = {row // group_size for row, reward in enumerate(output.rewards) if reward is None}
    if not unscored:
        return batch
    groups = len(rollouts) // group_size
    log.warning("%d of %d groups dropped, unscored samples: %s", len(unscored), groups, dict(output.causes))
    kept = [p for p in range(groups) if p not in unscored]
    return batch.select(kept) if kept else masked_out(batch.select([0]))


def truncated_rows(batch: ScoredBatch) -> Tensor:
    """Bool (N,): the token budget cut the response off."""
    cut = [rollout.finish_reason == "length" for rollout in batch.rollouts]
    return torch.tensor(cut, dtype=torch.bool, device=batch.trained_mask_NT.device)


def interleave(samples: Sequence[Rollout], extras: Sequence[Rollout], group_size: int) -> list[Rollout]:
    """Each prompt's ``group_size`` samples, followed by its extra row."""
    groups = (samples[p * group_size : (p + 1) * group_size] for p in range(len(extras)))
    return [rollout for group, extra in zip(groups, extras, strict=True) for rollout in (*group, extra)]


def join(parts: Sequence[BatchT]) -> BatchT:
    """One batch of several, their prompts in order, all as wide as the widest; they must hold the same tensors."""
    width = max(part.trained_mask_NT.shape[1] for part in parts)
    device = parts[-1].trained_mask_NT.device  # those of a checkpoint are on the host

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        rows = [torch.nn.functional.pad(x, (0, width - x.shape[1])) if x.ndim == 2 else x for x in tensors]
        return torch.cat([row.to(device) for row in rows])

    first = parts[0]
    names = [f.name for f in dataclasses.fields(first) if isinstance(getattr(first, f.name), Tensor)]
    return first.replace(
        rollouts=tuple(rollout for part in parts for rollout in part.rollouts),
        inputs=tuple(inputs for part in parts for inputs in part.inputs),
        components={name: joined([part.components[name] for part in parts]) for name in first.components},
        computed={name: joined([part.computed[name] for part in parts]) for name in first.computed},
        **{name: joined([getattr(part, name) for part in parts]) for name in names},
    )


def masked_out(batch: BatchT) -> BatchT:
    """The same rows with nothing to train: they weigh nothing in any loss, but can be sent through the model."""
    nothing_NT = torch.zeros_like(batch.trained_mask_NT)
    return batch.replace(
        sampled_mask_NT=nothing_NT, trained_mask_NT=nothing_NT, scores_N=torch.zeros_like(batch.scores_N)
    )


def gather_batch(batch: BatchT) -> tuple[BatchT, slice]:
    """The tensors of all ranks' batches in rank order, and which rows are this rank's. Collective.

    Rollouts and inputs stay those of this rank.
    """
    gather, own = row_gatherer(len(batch), batch.trained_mask_NT.device)
    return batch.map(gather), own


def sorted_over_ranks(batch: BatchT) -> tuple[BatchT, Tensor]:
    """The tensors of all ranks in an order that depends on prompts and samples alone, and this rank's rows in it.

    Random draws and ties go by position, which would otherwise differ with the number of ranks. Collective.
    """
    keys = [seed_from(rollout.prompt.uid, row % batch.group_size) for row, rollout in enumerate(batch.rollouts)]
    gather, own = row_gatherer(len(keys), batch.trained_mask_NT.device)
    order_N = gather(torch.tensor(keys, dtype=torch.int64, device=batch.trained_mask_NT.device)).argsort(stable=True)
    return batch.map(gather).map(lambda x: x[order_N]), order_N.argsort()[own]


def split_minibatches(batch: BatchT, parts: int, order: Sequence[int]) -> list[BatchT]:
    """``parts`` mini-batches of whole groups, as equal as possible, prompts taken in ``order``.

    A part without prompts (groups were dropped) is masked out, so that every rank makes the same number of updates.
    """
    cuts = torch.tensor(order).tensor_split(parts)
    return [batch.select(part.tolist()) if len(part) else masked_out(batch.select([0])) for part in cuts]


def drop_untrained_members(batch: BatchT) -> BatchT:
    """Without the members of a group that no group trains, such as a greedy answer that is a baseline only."""
    trained_PG = batch.by_prompt(batch.trained_mask_NT.any(1))
    members = trained_PG.any(0).nonzero()[:, 0].tolist()
    if len(members) in (0, batch.group_size):
        return batch
    return batch.select(range(len(batch.inputs)), members)
