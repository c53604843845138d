"""GRPO of this package as it is used: in a Lightning Trainer with its progress bar and a TensorBoard log a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from rllava_pl.callbacks import RolloutProgressBar
from rllava_pl.datamodules import BaseDataModule
from rllava_pl.loop.options import KL, Batching, Clip, Schedule
from rllava_pl.models import VLM
from rllava_pl.modules import GRPO
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Prompt, Sampling

if TYPE_CHECKING:
    from _common import Pace, Work


class Pictures(BaseDataModule):
    """The rows of the comparison."""

    def __init__(self, rows: list[Prompt], batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self.train_prompts = rows


class Clock(Callback):
    """Ticks at the end of every batch."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is loaded."""
        self.pace.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: None, batch: object, batch_idx: int
    ) -> None:
        """The time from one call to the next is a step."""
        self.pace.tick(lambda: _facts(trainer.callback_metrics))


def _facts(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    phases = {name: 1e3 * float(seconds) for name, seconds in metrics.items() if name.startswith("time/")}
    return {"reward": float(metrics["train/reward"]), **phases}


def run(work: Work, pace: Pace) -> None:
    """Train until the driver has seen all steps."""
    module = GRPO(
        VLM(work.checkpoint),
        [AnswerTagReward()],
        group_size=work.group_size,
        sampling=Sampling(max_tokens=work.max_tokens),
        max_rollouts=work.steps,
        batching=Batching(num_minibatches=work.minibatches),
        optimizer=lambda p: torch.optim.AdamW(
            p, lr=work.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
        schedule=Schedule(kind="linear", warmup_steps=work.warmup_updates, final_ratio=0.1),
        clip=Clip(low=work.clip_low, high=work.clip_high),
        kl=KL(loss_coef=work.kl_coef),
        seed=work.seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(work.output, name="ours"),
        enable_checkpointing=False,  # the others write none either
        callbacks=[RolloutProgressBar(), Clock(pace)],
    )
    trainer.fit(module, Pictures(work.dataset(), work.prompts))
