"""From gradients to new weights: denominators, clipping, optimizer and learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rllava_pl.functional.reduce import loss_denominator
from rllava_pl.functional.schedules import lr_factor
from rllava_pl.modules.options import Options
from rllava_pl.strategies import updates
from rllava_pl.strategies.collectives import sum_over_ranks, world_size
from rllava_pl.types import Experience

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class Optimization(Options):
    """The optimizer steps of ``RLModule``."""

    def denominators(self, minibatch: Experience) -> Tensor:
        """(loss count, token count) of the mini-batch over all ranks: divisors of the loss and of the entropy bonus."""
        mask_NT = minibatch.mask_NT
        rows = mask_NT[mask_NT.any(1)]  # rows that only keep a rank in step must not count
        count = loss_denominator(rows, self.aggregation, max_tokens=self.sampling.max_tokens)
        return sum_over_ranks(torch.stack([count, mask_NT.sum().to(count.dtype)]))

    def step(self) -> None:
        """Clip, step, schedule; one optimizer step whatever the number of micro-batches."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = updates.clip_gradients(self.trainer.strategy, parameters, self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        cast(LambdaLR, self.lr_schedulers()).step()
        self.updates_done += 1
        self.tally.add("grad_norm", norm)
        self.tally.add("loss", torch.zeros_like(norm), 1 / world_size())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, its learning rate scheduled by optimizer steps."""
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        total = self.max_rollouts * self.updates_per_rollout

        def factor(step: int) -> float:
            return lr_factor(
                step,
                schedule=self.lr_schedule,
                warmup_steps=self.warmup_steps,
                total_steps=total,
                final_ratio=self.final_lr_ratio,
            )

        return [optimizer], [LambdaLR(optimizer, factor)]
