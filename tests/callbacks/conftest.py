"""One short run with the callbacks that report on it, shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import rich
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from rllava_pl.callbacks import ExportHF, RolloutCheckpoint, RolloutProgressBar, RolloutTable, RunSummary
from rllava_pl.modules import PolicyModule
from tests import runs

ROLLOUTS = 4


@dataclass
class Run:
    """A fitted module and its output."""

    module: PolicyModule
    trainer: Trainer
    data: LightningDataModule
    callbacks: dict[type, Callback]
    output: str
    """Standard output of the fit."""

    @property
    def folder(self) -> Path:
        return Path(self.trainer.logger.log_dir)

    @property
    def page(self) -> str:
        return (self.folder / "rollouts.html").read_text("utf-8")


@pytest.fixture(autouse=True)
def plain_console() -> Iterator[None]:
    """A wide console that is not a terminal, restored after the test."""
    rich.reconfigure(width=160, force_terminal=False)
    yield
    rich.reconfigure()


def fit(root: Path, *, checkpoint: str | None = None) -> Run:
    """Four rollouts; the table and plain lines every two."""
    callbacks = [
        RolloutProgressBar(every_n_rollouts=2),
        RolloutTable(num_prompts=3, samples=2, every_n_rollouts=2),
        RunSummary(),  # before the two below, whose files it lists all the same
        ExportHF(),
        RolloutCheckpoint(every_n_rollouts=2, keep=0),
    ]
    logger = TensorBoardLogger(root, name="", version="run")
    trainer = runs.trainer(root, callbacks=callbacks, logger=logger, log_every_n_steps=1, enable_progress_bar=True)
    module, data = runs.module(max_rollouts=ROLLOUTS), runs.data()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        trainer.fit(module, data, ckpt_path=checkpoint)
    return Run(module, trainer, data, {type(callback): callback for callback in callbacks}, output.getvalue())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def resumed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run continued in another folder from its checkpoint after two rollouts."""
    return fit(tmp_path_factory.mktemp("rest"), checkpoint=str(run.folder / "checkpoints/rollout-000002.ckpt"))
