"""From gradients to new weights: denominators, clipping, optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rllava_pl.distributed.collectives import sum_over_ranks, world_size
from rllava_pl.functional.reduce import loss_denominator, reduce_loss
from rllava_pl.functional.schedules import lr_factor
from rllava_pl.loop.guard import Guard
from rllava_pl.loop.recovery import Done
from rllava_pl.strategies import adapter as updates
from rllava_pl.types import Experience

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class Counts(NamedTuple):
    """Divisors of a mini-batch's losses, over all ranks; 0-dim each."""

    loss: Tensor
    """Of the policy loss, by its aggregation."""
    tokens: Tensor
    """Trainable tokens: of the entropy bonus and of a critic's loss."""
    demonstrations: Tensor
    """Tokens that demonstrations gave."""
    selected: Tensor
    """Tokens that a loss treats apart."""


class Optimization(Guard):
    """The optimizer steps of ``RLModule``."""

    def denominators(self, minibatch: Experience) -> Counts:
        """Counts of the mini-batch over all ranks."""
        mask_NT = minibatch.own_mask_NT if self.demonstrations_apart else minibatch.mask_NT
        rows = mask_NT[mask_NT.any(1)]  # rows that only keep a rank in step must not count
        count = loss_denominator(rows, self.aggregation, max_tokens=self.sampling.max_tokens)
        selected_NT = torch.zeros_like(minibatch.mask_NT) if minibatch.selected_NT is None else minibatch.selected_NT
        masks = (minibatch.mask_NT, minibatch.demo_mask_NT, selected_NT)
        counts = [count, *(mask.sum().to(count.dtype) for mask in masks)]
        return Counts(*sum_over_ranks(torch.stack(counts)).unbind())

    def aggregate(self, loss_NT: Tensor, batch: Experience, counts: Counts) -> Tensor:
        """One number of per-token losses; demonstrations that stand apart add the mean over their own tokens.

        With one denominator for both, the weight of a demonstration would depend on how long it happens to be.
        """
        mask_NT = batch.own_mask_NT if self.demonstrations_apart else batch.mask_NT
        limit = self.sampling.max_tokens
        loss = reduce_loss(loss_NT, mask_NT, self.aggregation, denominator=counts.loss, max_tokens=limit)
        if self.demonstrations_apart:
            loss = loss + reduce_loss(loss_NT, batch.demo_mask_NT, "token-mean", denominator=counts.demonstrations)
        return loss

    def step(self, minibatch: Experience, losses: Sequence[Done[Tensor]]) -> bool:
        """Clip, step, schedule; one optimizer step whatever the number of micro-batches.

        Returns:
            False if a number was not finite, on any rank: then weights, moments and schedule are as before on all.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        norm = updates.clip_gradients(self.trainer.strategy, optimizer.optimizer, self.max_grad_norm)
        if not self.is_finite(minibatch, losses, norm):
            updates.discard_gradients(self.trainer.strategy, optimizer.optimizer)
            self.leave_out(minibatch, losses)
            return False
        optimizer.step()
        optimizer.zero_grad()
        cast(LambdaLR, self.lr_schedulers()).step()
        self.updates_done += 1
        self.skipped_in_a_row = 0
        self.tally.add("grad_norm", norm)
        self.tally.add("micro_batch_size", torch.full_like(norm, max(len(done.piece) for done in losses)))
        self.tally.add("loss", torch.zeros_like(norm), 1 / world_size())
        return True

    def parameter_groups(self) -> list[tuple[list[torch.nn.Parameter], float]]:
        """What is trained, each group with the factor of its learning rate."""
        return [([p for p in self.policy.parameters() if p.requires_grad], 1.0)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, its learning rate scheduled by optimizer steps."""
        groups = self.parameter_groups()
        optimizer = self.optimizer([{"params": parameters} for parameters, _ in groups])
        if self._trainer is not None:  # outside of a run there is no strategy it could fail
            updates.check_optimizer(self.trainer.strategy, optimizer)
        for group, (_, lr_factor_of_group) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] *= lr_factor_of_group
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
