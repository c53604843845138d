"""Importance weights for the difference between the engine's and the trainer's probabilities."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional.losses import importance_weights
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import EngineCorrection
from rllava_pl.types import TrainingBatch


def correct(loss_NT: Tensor, batch: TrainingBatch, options: EngineCorrection, metrics: MetricAccumulator) -> Tensor:
    """The loss of sampled tokens times π_old / π_engine, bounded as the options say; given tokens keep weight 1."""
    if options.level == "none":
        return loss_NT
    weights_NT = importance_weights(
        batch.old_logp_NT,
        batch.engine_logp_NT,
        batch.own_mask_NT,
        level=options.level,
        mode=options.mode,
        cap=options.cap,
    )
    metrics.add_masked({"engine_weight": weights_NT}, batch.own_mask_NT)
    return loss_NT * weights_NT.masked_fill(batch.given_mask_NT, 1.0)
