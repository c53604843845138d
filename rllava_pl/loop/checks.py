"""Options of a run, sizes of batches and results of hooks: what is wrong is refused, with the arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rllava_pl.distributed.collectives import gather_objects
from rllava_pl.loop.options import Batching, Schedule, require
from rllava_pl.loop.state import RunState
from rllava_pl.types import Credit, Sampling, ScoredBatch


def check_run_options(
    max_rollouts: int,
    batching: Batching,
    schedule: Schedule,
    sampling: Sampling,
    max_grad_norm: float,
    max_skipped: int,
) -> None:
    """Refuse options of a run that are out of range or contradict each other, with the arithmetic."""
    require(max_rollouts >= 0, "max_rollouts", max_rollouts, "at least 0")
    require(max_grad_norm > 0, "max_grad_norm", max_grad_norm, "larger than 0; .inf: no clipping")
    require(max_skipped >= 1, "max_skipped", max_skipped, "at least 1")
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0: all completions of a prompt would be equal")
    if schedule.kind == "constant":
        return
    if max_rollouts < 1:
        raise ValueError(f"schedule.kind {schedule.kind!r} decays over max_rollouts, which is {max_rollouts}")
    steps = max_rollouts * batching.updates_per_rollout
    if steps <= schedule.warmup_steps:
        raise ValueError(
            f"schedule.kind {schedule.kind!r} decays after schedule.warmup_steps={schedule.warmup_steps}, but the run "
            f"has max_rollouts {max_rollouts} x batching.num_minibatches {batching.num_minibatches} x "
            f"batching.update_epochs {batching.update_epochs} = {steps} steps; lower warmup_steps, raise max_rollouts "
            "or set schedule.kind: constant"
        )


def check_resume(checkpoint: Mapping[str, Any], seed: int, state: RunState) -> None:
    """Refuse a checkpoint of a run with another seed, and ranks that have read different checkpoints. Collective."""
    saved = checkpoint.get("hyper_parameters", {}).get("seed", seed)
    if saved != seed:
        raise ValueError(
            f"the checkpoint was made with seed {saved}, this run has seed {seed}: it would continue with other "
            "samples in another order; pass the same seed (--seed_everything)"
        )
    if len(set(gather_objects(state.saved_at_ns))) > 1:
        raise ValueError("ranks read different checkpoints; all need the same directory, on a shared file system")


def check_batch_size(prompts: int, group_size: int, num_minibatches: int) -> None:
    """Refuse a batch that mini-batches of whole groups cannot split, with the arithmetic."""
    if prompts % num_minibatches or not prompts:
        raise ValueError(
            f"{prompts} prompts x group_size {group_size} = {prompts * group_size} samples cannot be split into "
            f"{num_minibatches} mini-batches of whole groups; make the data's batch_size a multiple of it"
        )


def check_credit(owner: type, returned: Tensor | Credit, batch: ScoredBatch) -> Credit:
    """What ``advantages`` returned, with one advantage a token; other shapes than (N,) and (N, T) are refused."""
    credit = returned if isinstance(returned, Credit) else Credit(returned)
    rows_NT = batch.trained_mask_NT.shape
    if not isinstance(credit.advantages, Tensor) or credit.advantages.shape not in (rows_NT[:1], rows_NT):
        raise ValueError(
            f"{owner.__name__}.advantages returned {_shape(credit.advantages)}; it is one number a sample, "
            f"{tuple(rows_NT[:1])}, or a token, {tuple(rows_NT)}"
        )
    if credit.advantages.ndim > 1:
        return credit
    return dataclasses.replace(credit, advantages=credit.advantages[:, None].expand(rows_NT))


def check_token_loss(owner: type, loss_NT: Tensor, logp_NT: Tensor) -> Tensor:
    """The loss, unless it was reduced: a scalar would spread over all tokens and depend on the micro-batches."""
    if not isinstance(loss_NT, Tensor) or loss_NT.shape != logp_NT.shape:
        raise ValueError(
            f"{owner.__name__}.policy_loss returned {_shape(loss_NT)}; it is the loss of every token, "
            f"{tuple(logp_NT.shape)}, which the loop reduces (option aggregation)"
        )
    return loss_NT


def _shape(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
