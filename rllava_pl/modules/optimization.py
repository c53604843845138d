"""The update of the loop: micro-batches, loss, gradients, optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rllava_pl.functional.kl import kl_estimate
from rllava_pl.functional.reduce import loss_denominator, reduce_loss
from rllava_pl.functional.schedules import lr_factor
from rllava_pl.modules.experience import microbatches
from rllava_pl.strategies import updates
from rllava_pl.strategies.collectives import sum_over_ranks, world_size
from rllava_pl.types import Experience, PolicyOutput

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from rllava_pl.modules.base import RLModule


class Optimization(LightningModule):
    """Turns mini-batches into optimizer steps; part of ``RLModule``, which holds the options."""

    def update(self: RLModule, minibatch: Experience) -> None:
        """One optimizer step; the loss is normalised by counts of the whole mini-batch over all ranks."""
        with self.phase("update"):
            loss_count, token_count = self._denominators(minibatch).unbind()
            if token_count == 0:  # nothing to learn from on any rank: all ranks leave together
                return
            pieces = microbatches(minibatch, self.micro_batch_size)
            for k, piece in enumerate(pieces):
                with updates.micro_batch(self.trainer.strategy, last=k == len(pieces) - 1):
                    loss = self.loss(self.trainer.strategy.model(piece.batch), piece, loss_count, token_count)
                    self.manual_backward(loss * world_size())  # gradients are averaged over ranks, the loss is a sum
            self._step()

    def loss(self: RLModule, output: PolicyOutput, batch: Experience, loss_count: Tensor, token_count: Tensor) -> Tensor:
        """This micro-batch's share of the mini-batch's loss: policy + KL - entropy bonus."""
        logp_NT, mask_NT = output.logp_NT, batch.mask_NT
        if batch.old_logp_NT is None:
            batch = batch.replace(old_logp_NT=logp_NT.detach())
        loss_NT = self.policy_loss(logp_NT, batch)
        if self.kl_loss_coef:
            loss_NT = loss_NT + self.kl_loss_coef * kl_estimate(logp_NT, batch.ref_logp_NT, self.kl_estimator)
        limit = self.sampling.max_tokens
        loss = reduce_loss(loss_NT, mask_NT, self.aggregation, denominator=loss_count, max_tokens=limit)
        self.observe(output, batch, loss)
        if self.entropy_coef:
            bonus = reduce_loss(output.entropy_NT, mask_NT, "token-mean", denominator=token_count)
            loss = loss - self.entropy_coef * bonus
        return loss

    @torch.no_grad()
    def observe(self: RLModule, output: PolicyOutput, batch: Experience, loss: Tensor) -> None:
        """Token statistics of one micro-batch, for the report."""
        logp_NT, mask_NT, tally = output.logp_NT, batch.mask_NT, self.tally
        log_ratio_NT = logp_NT - batch.old_logp_NT
        outside_NT = (log_ratio_NT.exp() < 1 - self.clip_low) | (log_ratio_NT.exp() > 1 + self.clip_high)
        tally.add("loss", loss, 0)  # a sum over micro-batches and ranks; counted once an optimizer step
        tally.add_masked("clip_fraction", outside_NT.float(), mask_NT)
        tally.add_masked("entropy", output.entropy_NT, mask_NT)
        if batch.ref_logp_NT is not None:
            tally.add_masked("kl", kl_estimate(logp_NT, batch.ref_logp_NT, "k3"), mask_NT)
        if self.first_update:  # the policy still is the one that sampled: what differs is the engine's arithmetic
            tally.add_masked("engine_mismatch_kl", kl_estimate(batch.engine_logp_NT, logp_NT, "k3"), mask_NT)

    def _denominators(self: RLModule, minibatch: Experience) -> Tensor:
        """(loss count, token count) of the mini-batch over all ranks: what losses and the entropy bonus are divided by."""
        mask_NT = minibatch.mask_NT
        rows = mask_NT[mask_NT.any(1)]  # rows that only keep a rank in step must not count
        count = loss_denominator(rows, self.aggregation, max_tokens=self.sampling.max_tokens)
        return sum_over_ranks(torch.stack([count, mask_NT.sum().to(count.dtype)]))

    def _step(self: RLModule) -> None:
        """Clip, step, schedule; one optimizer step whatever the number of micro-batches."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = updates.clip_gradients(self.trainer.strategy, parameters, self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        self.updates_done += 1
        self.tally.add("grad_norm", norm)
        self.tally.add("loss", torch.zeros_like(norm), 1 / world_size())

    def configure_optimizers(self: RLModule) -> OptimizerLRScheduler:
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

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]
