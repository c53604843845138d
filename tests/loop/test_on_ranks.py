"""On several ranks: a number that is not finite on one stops the step of all; memory that is full on one does not."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rllava_pl.modules import GRPO, RLModule
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput
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
        left_out = trainer.callback_metrics.get("train/skipped_nonfinite", torch.tensor(0.0))
        torch.save({n: p.detach() for n, p in module.named_parameters()} | {"left out": left_out}, file(rank))

    def file(rank: int) -> Path:
        return root / f"{name}-{rank}.pt"

    runs.tiny().prepare(1)
    codes = forks.run(task, log, ranks=2)
    assert codes == [0, 0], log.read_text()[-3000:]
    return [torch.load(file(rank), weights_only=True) for rank in (0, 1)], log.read_text()


class Spoilt(GRPO):
    """A module that something is done to when its policy is there."""

    spoil: Callable[[], None]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.spoil()


def test_what_is_not_finite_on_one_rank_stops_the_step_of_all(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        """The second rollout of rank 1 has a sample whose advantage is no number; each rank has two mini-batches."""
        credit = module.credit

        def spoilt(experience: Experience) -> Experience:
            experience = credit(experience)
            if rank == 1 and module.rollout_index == 1:
                advantages_NT = experience.advantages_NT.clone()
                advantages_NT[2] = math.nan
                return experience.replace(advantages_NT=advantages_NT)
            return experience

        module.credit = spoilt

    (first, second), said = fits(tmp_path, "guard", spoil)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["left out"] == 1.0 and all(x.isfinite().all() for x in first.values())
    lines = {line[line.index("rollout 1") :] for line in said.splitlines() if "an update was left out" in line}
    assert len(lines) == 1 and "#2" in lines.pop()  # both ranks name the same sample


def test_memory_that_is_full_on_one_rank_changes_nothing(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        forward = module.policy.forward

        def bounded(batch: PolicyBatch) -> PolicyOutput:
            if rank == 1 and len(batch.mask_NT) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(batch)

        module.policy.forward = bounded

    (wide, same), _ = fits(tmp_path, "wide")
    (first, second), said = fits(tmp_path, "narrow", spoil)
    assert all(torch.equal(wide[name], same[name]) for name in wide)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(wide[name], first[name], atol=1e-5) for name in wide)
    assert "does not fit; going on with 1" in said


def test_memory_that_is_full_in_the_exchange_ends_the_run_with_advice(tmp_path: Path) -> None:
    def spoil(module: RLModule, rank: int) -> None:
        backpropagate = module.backpropagate

        def full_at_the_end(counts, piece, last):
            if rank == 1 and last:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return backpropagate(counts, piece, last)

        module.backpropagate = full_at_the_end

    with pytest.raises(AssertionError, match="this rank alone cannot begin an exchange between ranks again; set micro"):
        fits(tmp_path, "exchange", spoil)
