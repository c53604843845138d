"""An algorithm outside the package: two hooks, eight lines of code, nothing to register.

From Python, 100 rollouts in about half a minute on one CPU core::

    python examples/own_algorithm.py 100

From the command line, by its dotted path, instead of the config's algorithm::

    python -m rllava_pl fit --config tiny/colour --model examples.own_algorithm.Tournament
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rllava_pl.callbacks import RolloutProgressBar
from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.datamodules.synthetic import TASKS
from rllava_pl.loop.options import Batching, Schedule
from rllava_pl.models import TinyVLM
from rllava_pl.modules import RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import RewardedBatch, Sampling, TrainingBatch


class Tournament(RLModule):
    """The completions of a prompt are compared pairwise; only which is better counts, not by how much.

    A_i = mean over j of sign(r_i - r_j): wins minus losses per game, in (-1, 1), 0 for a group of equal rewards.
    loss = |A|/(2ε)·(ρ - 1)² - A·ρ with ε = ``clip.low``: a parabola with its minimum at ρ = 1 ± ε, where PPO's clipped
    surrogate is flat (SPO, arXiv 2401.16025).
    """

    needs_groups = True

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Wins minus losses per game, (N,)."""
        rewards_PG = batch.by_prompt(batch.rewards_N)
        return (rewards_PG[:, :, None] - rewards_PG[:, None, :]).sign().mean(2).flatten()

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """SPO's parabola of every token."""
        ratio_NT = (logp_NT - batch.old_logp_NT).exp()
        return batch.advantages_NT.abs() / (2 * self.clip.low) * (ratio_NT - 1) ** 2 - batch.advantages_NT * ratio_NT


def main(rollouts: int = 100) -> Trainer:
    """Train on the colours of drawn shapes and test."""
    task = TASKS["color"]
    module = Tournament(
        TinyVLM(questions=[task.question], answers=list(task.answers)),
        rewards=[AnswerTagReward()],
        sampling=Sampling(max_tokens=8),
        max_rollouts=rollouts,
        batching=Batching(
            num_minibatches=2
        ),  # with a single update a rollout ρ = 1, and any surrogate is the plain policy gradient
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        schedule=Schedule(kind="linear"),
    )
    data = SyntheticVisionDataModule("color", batch_size=32)
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=[RolloutProgressBar()], logger=False, enable_checkpointing=False
    )
    trainer.fit(module, data)
    trainer.test(module, data)
    return trainer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
