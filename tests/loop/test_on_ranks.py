"""On two ranks: a number that is not finite on one skips the step of both; too little memory on one does not."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from rllava_pl.modules import GRPO, RLModule
from rllava_pl.types import PolicyBatch, PolicyOutput, ScoredBatch, TrainingBatch
from tests import runs
from tests.reliability import forks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

Weights = dict[str, torch.Tensor]


def fits(root: Path, name: str, spoil: Callable[[RLModule, int], None] | None = None) -> tuple[list[Weights], str]:
    """Weights at the end on both ranks, and what they logged."""
    log = root / f"{name}.log"

    def task(rank: int) -> None:
        logging.basicConfig(filename=log, force=True)
        module = runs.module(Spoilt, max_rollouts=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        module.spoil = (lambda: spoil(module, rank)) if spoil else (lambda: None)
        trainer = runs.trainer(root, strategy="rl_ddp", devices=2)
        try:
            trainer.fit(module, runs.data(batch_size=2))
        except RuntimeError as error:
            logging.error(error)
            raise
        skipped = trainer.callback_metrics.get("train/skipped_nonfinite", torch.tensor(0.0))
        torch.save({n: p.detach() for n, p in module.named_parameters()} | {"skipped": skipped}, file(rank))

    def file(rank: int) -> Path:
        return root / f"{name}-{rank}.pt"

    runs.tiny().prepare(1)
    codes = forks.run(task, log, ranks=2)
    assert codes == [0, 0], log.read_text()[-3000:]
    return [torch.load(file(rank), weights_only=True) for rank in (0, 1)], log.read_text()


class Spoilt(GRPO):
    """A module that is changed once its policy is loaded."""

    spoil: Callable[[], None]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.spoil()


def test_number_that_is_not_finite_on_one_rank_skips_the_step_of_both(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        """The second rollout of rank 1 has a sample whose advantage is no number; each rank has two mini-batches."""
        compute_advantages = module.compute_advantages

        def spoilt(batch: ScoredBatch) -> TrainingBatch:
            training_batch = compute_advantages(batch)
            if rank == 1 and module.state.rollouts == 1:
                advantages_NT = training_batch.advantages_NT.clone()
                advantages_NT[2] = math.nan
                return training_batch.replace(advantages_NT=advantages_NT)
            return training_batch

        module.compute_advantages = spoilt

    (first, second), text = fits(tmp_path, "guard", spoil)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["skipped"] == 1.0 and all(x.isfinite().all() for x in first.values())
    lines = {line[line.index("rollout 1") :] for line in text.splitlines() if "an update was skipped" in line}
    assert len(lines) == 1 and "#2" in lines.pop()  # both ranks name the same sample


def test_too_little_memory_on_one_rank_changes_nothing(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        forward = module.policy.forward

        def bounded(batch: PolicyBatch, **options: bool) -> PolicyOutput:
            if rank == 1 and len(batch.mask_NT) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(batch, **options)

        module.policy.forward = bounded

    (wide, same), _ = fits(tmp_path, "wide")
    (first, second), text = fits(tmp_path, "narrow", spoil)
    assert all(torch.equal(wide[name], same[name]) for name in wide)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(wide[name], first[name], atol=1e-5) for name in wide)
    assert "does not fit in memory; continuing with 1" in text


def test_too_little_memory_in_the_last_micro_batch_ends_the_run_with_advice(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        accumulate = module.updater.adapter.accumulate

        def full_at_the_end(last: bool) -> AbstractContextManager[None]:
            if rank == 1 and last:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return accumulate(last)

        module.updater.adapter.accumulate = full_at_the_end

    error = "one rank alone cannot repeat an exchange between ranks; set batching.micro"
    with pytest.raises(AssertionError, match=error):
        fits(tmp_path, "exchange", spoil)
