"""A reward outside the package: half marks for a digit that looks like the right one.

From Python, 100 rollouts in about half a minute on one CPU core::

    python examples/own_reward.py 100

The same class from the command line, by its dotted path, added to those of the config::

    python -m rllava_pl fit --config quickstart --model.rewards+=examples.own_reward.LookalikeReward
"""

from __future__ import annotations

import re
import sys

import torch
from lightning.pytorch import Trainer

from rllava_pl.callbacks import RolloutProgressBar
from rllava_pl.datamodules import DigitsDataModule
from rllava_pl.models import TinyVLM
from rllava_pl.modules import GRPO
from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.types import Rollout, Sampling, Score


class LookalikeReward(BaseReward):
    """0.5 if the answer is not the right digit, but one that is easily taken for it."""

    PAIRS = ({"1", "7"}, {"3", "8"}, {"4", "9"}, {"5", "6"})

    def score(self, rollout: Rollout) -> Score:
        """``rollout`` has the text, the token ids, the finish reason, and the prompt with its answer and metadata."""
        answer = re.fullmatch("<answer>([0-9])</answer>", rollout.text)
        near = answer is not None and {answer[1], rollout.prompt.answer} in self.PAIRS
        return Score(0.5 * near)


def main(rollouts: int = 100) -> Trainer:
    """Train on handwritten digits and test."""
    module = GRPO(
        TinyVLM(questions=["Which digit is it?"], answers=list("0123456789")),
        rewards=[AnswerTagReward(), LookalikeReward()],
        sampling=Sampling(max_tokens=8),
        max_rollouts=rollouts,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    )
    data = DigitsDataModule(batch_size=32)
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=[RolloutProgressBar()], logger=False, enable_checkpointing=False
    )
    trainer.fit(module, data)
    trainer.test(module, data)  # test/lookalike: 0.5 x the fraction of near misses
    return trainer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
