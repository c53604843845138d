"""GRPO in an existing Lightning project: your Trainer, callbacks, logger and data, no command line.

    python examples/inside_your_trainer.py 6

Six epochs, a quarter of a minute on one CPU core; writes ``lightning_logs/`` where it is started.

One ``training_step`` is one rollout, so log every step; ``max_steps`` and ``ModelCheckpoint`` count
optimizer steps, ``num_minibatches`` x ``update_epochs`` of them a rollout; gradients are clipped by
``GRPO(max_grad_norm=...)`` and micro-batches made by ``Batching(micro_batch_size=...)``, not by the Trainer.
"""

from __future__ import annotations

import random
import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from rllava_pl.loop.options import Batching, Schedule
from rllava_pl.models import TinyVLM
from rllava_pl.modules import GRPO
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Message, Prompt, PromptBatch, Sampling

QUESTION, ANSWERS = "Is the box tall or wide?", ("tall", "wide")


def draw_prompts(split: str, count: int) -> list[Prompt]:
    """Your data: any list, or other sequence, of ``Prompt``."""
    rng = random.Random(split)
    prompts = []
    for row in range(count):
        answer = ANSWERS[row % 2]
        width, height = (10, 30) if answer == "tall" else (30, 10)
        left, top = rng.randrange(56 - width), rng.randrange(56 - height)
        image = Image.new("RGB", (56, 56), "black")
        ImageDraw.Draw(image).rectangle((left, top, left + width, top + height), fill="orange")
        message = Message.parse("user", f"<image>{QUESTION}")
        prompts.append(Prompt(f"{split}:{row}", (message,), images=(image,), answer=answer))
    return prompts


class PrintReward(Callback):
    """Your callback: one ``training_step`` is one rollout, and its metrics are where Lightning's always are."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Every tenth rollout."""
        if pl_module.state.rollouts % 10 == 0:
            print(f"rollout {pl_module.state.rollouts}: reward {trainer.callback_metrics['train/reward']:.2f}")


def main(epochs: int = 6) -> Trainer:
    """Train until nearly every answer is right, and validate the best checkpoint."""
    seed_everything(1)  # of the loader's order; sampling has its own seed, GRPO(seed=...)
    module = GRPO(
        TinyVLM(questions=[QUESTION], answers=list(ANSWERS)),
        rewards=[AnswerTagReward()],
        sampling=Sampling(max_tokens=8),
        batching=Batching(num_minibatches=2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        schedule=Schedule(warmup_steps=10),
    )
    train = DataLoader(draw_prompts("train", 320), batch_size=32, shuffle=True, drop_last=True, collate_fn=PromptBatch)
    val = DataLoader(draw_prompts("val", 64), batch_size=64, collate_fn=PromptBatch)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=CSVLogger("."),
        callbacks=[
            LearningRateMonitor(logging_interval="step"),
            EarlyStopping("val/accuracy", mode="max", stopping_threshold=0.98, patience=10),
            ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best"),
            PrintReward(),
        ],
        enable_progress_bar=False,
    )
    trainer.fit(module, train, val)
    trainer.validate(module, val, ckpt_path="best")
    return trainer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
