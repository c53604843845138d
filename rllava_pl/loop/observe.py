"""What is measured: of samples when they are scored, of tokens when they are trained. Means over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rllava_pl.functional.kl import kl_estimate
from rllava_pl.loop.batch import truncated_rows
from rllava_pl.loop.group_buffer import GroupBuffer
from rllava_pl.loop.metrics import MetricAccumulator, moments
from rllava_pl.loop.phases import Phases
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.types import PolicyOutput, ScoredBatch, TrainingBatch


def samples(metrics: MetricAccumulator, batch: ScoredBatch, group_buffer: GroupBuffer) -> None:
    """Statistics of sampled, trained rows: not of demonstrations, greedy baselines and masked-out groups."""
    counted_N = batch.own_mask_NT.any(1)
    values = {
        "reward": batch.scores_N,
        "response_tokens": batch.lengths_N,
        "truncated_fraction": truncated_rows(batch),
    }
    if batch.group_size > 1:  # a completion without others to compare with is no group
        values["informative_groups"] = group_buffer.informative(batch)
    metrics.add_masked(values | moments("reward_std", batch.scores_N), counted_N)
    for name, component_N in batch.components.items():  # NaN where the reward does not apply to the row
        applies_N = counted_N & ~component_N.isnan()
        metrics.add_masked({f"reward_{name}": component_N}, applies_N)


def penalties(metrics: MetricAccumulator, batch: ScoredBatch, penalties_N: Tensor | None) -> None:
    """Mean of the length penalties of the same rows as in ``samples``."""
    if penalties_N is not None:
        metrics.add_masked({"overlong_penalty": penalties_N}, batch.own_mask_NT.any(1))


@torch.no_grad()
def tokens(
    metrics: MetricAccumulator,
    output: PolicyOutput,
    batch: TrainingBatch,
    clipped_NT: Tensor,
    *,
    first_update: bool,
    exact: bool,
) -> None:
    """Statistics of one micro-batch in its update.

    Args:
        metrics: Where they go.
        output: Of the policy being trained.
        batch: With ``old_logp_NT``.
        clipped_NT: Tokens whose gradient the loss holds at 0.
        first_update: The policy still is the one that sampled: what differs is the engine's arithmetic.
        exact: The engine computes with the trainer's arithmetic.
    """
    logp_NT, own_NT = output.logp_NT, batch.own_mask_NT
    values = {
        "entropy": output.entropy_NT,
        "clip_fraction": clipped_NT,
        "clip_fraction_high": clipped_NT & (batch.advantages_NT > 0),
        "clip_fraction_low": clipped_NT & (batch.advantages_NT < 0),
    }
    if "ref_logp_NT" in batch.computed:
        values["kl"] = kl_estimate(logp_NT, batch.ref_logp_NT, "k3")
    if first_update:
        values["engine_mismatch_kl"] = kl_estimate(batch.engine_logp_NT, logp_NT, "k3")
        if not exact:
            values["engine_gap_mean"] = gap_NT = (batch.engine_logp_NT - logp_NT).abs()
            metrics.add_max("engine_gap_max", gap_NT, own_NT)
    ratio_NT = (logp_NT - batch.old_logp_NT).clamp(-20, 20).exp()
    metrics.add_masked(values | moments("effective_sample_size", ratio_NT), own_NT)


def generation(
    metrics: MetricAccumulator, engine: ManagedEngine, group_buffer: GroupBuffer, device: torch.device
) -> None:
    """How often the engine was called again, and how many rounds the batch took, where either can be."""
    if engine.retries:
        metrics.add_total("engine_faults", torch.tensor(engine.take_faults(), device=device))
    if group_buffer.options.max_rounds:
        metrics.add("extra_rounds", torch.tensor(group_buffer.extra_rounds, device=device))


def publish(metrics: Mapping[str, float], module: LightningModule, step: int) -> None:
    """Send metrics to the loggers and callbacks of a module's Trainer.

    They go to loggers directly, as Lightning's own monitors do: ``module.log`` would drop all but every
    ``log_every_n_steps``-th rollout (50 by default) and costs 0.2 ms a name.
    """
    for logger in module.loggers:
        logger.log_metrics(dict(metrics), step=step)
    values = {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
    module.trainer.callback_metrics.update(values)
    module.trainer.logged_metrics.update(values)


def rollout_metrics(metrics: MetricAccumulator, phases: Phases) -> dict[str, float]:
    """``train/...`` and ``time/..._seconds`` of the rollout that ends; both start again. Collective."""
    found = {f"train/{name}": value for name, value in metrics.means().items()}
    found |= {f"time/{name}_seconds": value for name, value in phases.seconds.items()}
    metrics.clear()
    phases.seconds.clear()
    return found
