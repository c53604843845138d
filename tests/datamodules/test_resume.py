"""A real Trainer, interrupted and resumed, sees exactly the prompts of the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.datamodules import BaseDataModule
from rllava_pl.types import Prompt, PromptBatch

BATCHES = 5  # 22 rows in batches of 4; two rows are left out of each epoch


class Rows(BaseDataModule):
    def __init__(self, rows: int = 22, **options: int) -> None:
        super().__init__(**options)
        self.rows = rows

    def setup(self, stage: str) -> None:
        self.train_prompts = [Prompt(f"train:{k}", ()) for k in range(self.rows)]
        self.val_prompts = [Prompt(f"val:{k}", ()) for k in range(5)]
        self.test_prompts = self.val_prompts


class Recorder(LightningModule):
    """Manual optimisation with two optimizer steps a batch, as RL modules have; records the uids."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.done = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append([prompt.uid for prompt in batch])
        self.trainer.saver.save("in_step")
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.weight.square().sum())
            optimizer.step()
        self.done += 1

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        pass

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append([prompt.uid for prompt in batch])

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        return [prompt.uid for prompt in batch]


class Saver(Callback):
    """Saves once, at a named point of the loop, when ``after`` batches are done."""

    def __init__(self, point: str = "", after: int = -1, path: Path | None = None) -> None:
        self.point, self.after, self.path = point, after, path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module
        trainer.saver = self

    def save(self, point: str) -> None:
        if point == self.point and self.module.done == self.after and not self.path.exists():
            self.trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, *_: object) -> None:
        self.save("batch_end")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.save("validation_end")

    def on_train_epoch_start(self, *_: object) -> None:
        self.save("epoch_start")

    def on_train_epoch_end(self, *_: object) -> None:
        self.save("epoch_end")


def trainer_of(saver: Saver | None = None, **options: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver or Saver()],
        **options,
    )


def fit(limit: dict[str, int], workers: int = 0, saver: Saver | None = None, ckpt_path: Path | None = None, **options):
    module = Recorder()
    data = Rows(**{"batch_size": 4, "seed": 3, "num_workers": workers} | options)
    # Validation twice in an epoch: after batches 2 and 4.
    trainer_of(saver, val_check_interval=2, **limit).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


EPOCHS = {"max_epochs": 2}
STEPS = {"max_steps": 2 * 2 * BATCHES}  # two optimizer steps a batch
POINTS = [("batch_end", 2), ("batch_end", 5), ("batch_end", 7), ("validation_end", 2), ("in_step", 1), ("in_step", 5)]
BORDERS = [("epoch_end", 5), ("epoch_start", 5), ("epoch_start", 0)]


@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize(("point", "after"), POINTS + BORDERS)
def test_resumed_run_sees_the_prompts_of_the_uninterrupted_one(tmp_path, point, after, limit):
    whole = fit(limit)
    assert len(whole) == 2 * BATCHES
    saver = Saver(point, after, tmp_path / "run.ckpt")
    assert fit(limit, saver=saver) == whole
    assert fit(limit, ckpt_path=saver.path) == whole[after:]


@pytest.mark.parametrize(("point", "after"), [("batch_end", 2), ("batch_end", 5), ("epoch_end", 5)])
def test_batches_fetched_ahead_by_workers_are_not_lost(tmp_path, point, after):
    whole = fit(EPOCHS)
    saver = Saver(point, after, tmp_path / "run.ckpt")
    assert fit(EPOCHS, workers=1, saver=saver) == whole
    assert fit(EPOCHS, workers=1, ckpt_path=saver.path) == whole[after:]


def test_epochs_differ_in_order_and_repeat_no_row():
    whole = fit(EPOCHS)
    first, second = ([uid for batch in part for uid in batch] for part in (whole[:BATCHES], whole[BATCHES:]))
    assert len(set(first)) == len(first) == len(set(second)) == len(second) == 20
    assert first != second


def test_resume_with_another_batch_size_is_refused_with_the_numbers(tmp_path):
    saver = Saver("batch_end", 2, tmp_path / "run.ckpt")
    fit(EPOCHS, saver=saver)
    with pytest.raises(ValueError, match="after batch 2: prompts_per_batch was 4, is 5"):
        fit(EPOCHS, ckpt_path=saver.path, batch_size=5)


def test_evaluation_and_prediction_see_every_test_row_once():
    data, module = Rows(batch_size=4, val_batch_size=2), Recorder()
    expected = [["val:0", "val:1"], ["val:2", "val:3"], ["val:4"]]
    assert trainer_of().predict(module, datamodule=data) == expected
    trainer_of().test(module, datamodule=data, verbose=False)
    assert module.seen == expected


def test_overfit_batches_repeats_the_same_prompts():
    module = Recorder()
    trainer_of(max_epochs=2, overfit_batches=1).fit(module, datamodule=Rows(batch_size=4))
    assert module.seen == [[f"train:{k}" for k in range(4)]] * 2
