"""One optimizer step from a mini-batch: denominators, micro-batches, clipping, finite check, optimizer, schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from rllava_pl.distributed.collectives import gather_objects, rank, sum_over_ranks, world_size
from rllava_pl.functional.reduce import loss_denominator, reduce_loss
from rllava_pl.loop import guard
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.micro_batches import MicroBatches, Result, join_rows, numbered
from rllava_pl.loop.options import Batching
from rllava_pl.loop.state import RunState
from rllava_pl.strategies.adapter import StrategyAdapter
from rllava_pl.types import PolicyBatch, PolicyOutput, ScoredBatch, Term, TrainingBatch

log = logging.getLogger(__name__)

Terms = Callable[[TrainingBatch], Mapping[str, Term]]
Losses = Callable[[PolicyOutput, TrainingBatch], Mapping[str, Tensor]]
Forward = Callable[[PolicyBatch], PolicyOutput]


class Updater:
    """Optimizer steps, and forward passes without gradients, in micro-batches.

    The loss of a mini-batch is Σ_k weight_k · reduce(loss_k) over named terms, each (N, T) with its own mask and
    aggregation. Their denominators count the mini-batch of all ranks before the first backward, so that the gradient
    depends neither on micro-batches nor on the number of ranks.

    Args:
        batching: Size of micro-batches.
        max_grad_norm: Gradients are scaled down to this global L2 norm.
        max_skipped: Updates in a row that may be skipped because a number is not finite.
        max_tokens: Response budget, the divisor of the aggregation "constant".
        state: Counters of the run.
        metrics: Where losses and norms go.
        rows_together: Consecutive rows that stay in one micro-batch.
        between_micro_batches: Called before each; what it raises ends the run.
    """

    def __init__(
        self,
        batching: Batching,
        *,
        max_grad_norm: float,
        max_skipped: int,
        max_tokens: int,
        state: RunState,
        metrics: MetricAccumulator,
        rows_together: int = 1,
        between_micro_batches: Callable[[], None] = lambda: None,
    ) -> None:
        self.micro_batches = MicroBatches(batching, rows_together)
        self.max_grad_norm = max_grad_norm
        self.max_skipped = max_skipped
        self.max_tokens = max_tokens
        self.state = state
        self.metrics = metrics
        self.between_micro_batches = between_micro_batches
        self.dump_directory = Path()

    def connect(self, adapter: StrategyAdapter, dump_directory: Path) -> None:
        """Use a strategy from now on; a mini-batch that ends the run is written to ``dump_directory``."""
        self.adapter = adapter
        self.dump_directory = dump_directory

    def connect_optimizer(self, optimizer: LightningOptimizer, scheduler: LRScheduler) -> None:
        """Step these from now on."""
        self.optimizer, self.scheduler = optimizer, scheduler

    def step(self, minibatch: TrainingBatch, terms: Terms, losses: Losses) -> bool:
        """One optimizer step on the ``terms`` of a mini-batch, whose values (N, T) ``losses`` computes.

        Returns:
            False if nothing was trained: no token counts on any rank, or a number was not finite. Weights, moments and
            schedule are then as before on all ranks.

        Raises:
            NonFiniteError: ``max_skipped`` updates in a row were skipped; the mini-batch is on disk.
        """
        counts = self.denominators(terms(minibatch))
        if not any(counts.values()):  # all ranks return together
            self.metrics.add_total("skipped_updates", torch.ones((), device=minibatch.scores_N.device) / world_size())
            return False
        snapshot = self.metrics.snapshot()

        def undo() -> None:
            self.metrics.rollback(snapshot)
            self.adapter.discard_gradients(self.optimizer.optimizer)

        results = self.micro_batches.run(
            minibatch,
            lambda micro_batch, last: self._backward(micro_batch, last, counts, terms, losses),
            can_retry=self.adapter.can_retry,
            exchanges_gradients=True,
            before_retry=undo,
            between=self.between_micro_batches,
        )
        losses_M = torch.stack([result.value for result in results])
        norm = self.adapter.clip_grad_norm(self.optimizer.optimizer, self.max_grad_norm)
        if not guard.all_finite(minibatch, losses_M, norm):
            undo()
            self._skip(minibatch, results)
            return False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.state.updates += 1
        self.state.skipped_in_a_row = 0
        self._log_step(norm, list(counts), results, losses_M)
        return True

    def denominators(self, terms: Mapping[str, Term]) -> dict[str, Tensor]:
        """What the sum of each term is divided by: a count of the mini-batch of all ranks. Collective."""
        counts = []
        for term in terms.values():
            rows = term.mask_NT[term.mask_NT.any(1)]  # masked-out rows must not count
            counts.append(loss_denominator(rows, term.aggregation, max_tokens=self.max_tokens))
        return dict(zip(terms, sum_over_ranks(torch.stack(counts)).unbind(), strict=True))

    @torch.no_grad()
    def forward(self, policy: Forward, batch: ScoredBatch, mask_NT: Tensor | None = None) -> PolicyOutput:
        """Log-probs under ``policy`` of the tokens in ``mask_NT`` (the trained ones by default), without gradients."""
        if mask_NT is not None:
            batch = batch.replace(trained_mask_NT=mask_NT)
        with self.adapter.accumulate(last=False):  # no gradients are exchanged
            results = self.micro_batches.run(
                numbered(batch),
                lambda micro_batch, last: policy(micro_batch.policy_batch()),
                can_retry=self.adapter.can_retry,
                between=self.between_micro_batches,
            )
        parts, outputs = zip(*results, strict=True)
        columns = zip(*outputs, strict=True)
        return PolicyOutput(*(x[0] if x[0] is None else join_rows(x, parts, batch.trained_mask_NT) for x in columns))

    def _backward(
        self, micro_batch: TrainingBatch, last: bool, counts: Mapping[str, Tensor], terms: Terms, losses: Losses
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns the total loss and each term's, detached."""
        with self.adapter.accumulate(last=last):
            output = self.adapter.model(micro_batch.policy_batch())
            values = losses(output, micro_batch)
            reduced, total = [], torch.zeros((), device=output.logp_NT.device)
            for name, term in terms(micro_batch).items():
                loss = reduce_loss(
                    values[name], term.mask_NT, term.aggregation, denominator=counts[name], max_tokens=self.max_tokens
                )
                reduced.append(loss.detach())
                total = total + term.weight * loss
            self.adapter.backward(total * world_size())  # gradients are averaged over ranks, the loss is a sum
        return torch.stack([total.detach(), *reduced])

    def _log_step(
        self, norm: Tensor, names: list[str], results: list[Result[TrainingBatch, Tensor]], losses_M: Tensor
    ) -> None:
        """Losses are sums over micro-batches and ranks, counted once an optimizer step."""
        once = 1 / world_size()
        self.metrics.add_all(["loss", *(f"{name}_loss" for name in names)], losses_M.sum(0), once)
        self.metrics.add("grad_norm", norm)
        self.metrics.add("micro_batch_size", torch.full_like(norm, max(len(result.batch) for result in results)))

    def _skip(self, minibatch: TrainingBatch, results: list[Result[TrainingBatch, Tensor]]) -> None:
        """Count a skipped update, name the samples behind it, and stop after too many. Collective."""
        self.metrics.add_total("skipped_nonfinite", torch.ones_like(results[0].value[0]) / world_size())
        self.state.skipped_in_a_row += 1
        output = self.forward(self.adapter.model, minibatch)
        losses = [(result.batch, result.value) for result in results]
        found = guard.describe(gather_objects(guard.find_suspects(minibatch, output, losses)))
        message = f"rollout {self.state.rollouts}: an update was skipped, not finite: {found or 'the gradient alone'}"
        log.warning(message)
        if self.state.skipped_in_a_row >= self.max_skipped:
            path = self.dump_directory / f"nonfinite-{self.state.rollouts:06d}-rank-{rank()}.pt"
            guard.save_batch(minibatch, path)
            raise guard.NonFiniteError(
                f"{message}. It is number {self.state.skipped_in_a_row} in a row; its mini-batch is in {path}"
            )
