"""Answers to the same few prompts during training, as a page for people to read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich import get_console
from rich.table import Table
from rich.text import Text

from rllava_pl.callbacks import rollout_page as page
from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.callbacks.rollout_page import Answer, Moment
from rllava_pl.callbacks.splits import batches, split_loaders
from rllava_pl.checkpoint.atomic import write_text
from rllava_pl.modules import PolicyModule
from rllava_pl.rewards import RewardOutput
from rllava_pl.types import Prompt, Rollout

log = logging.getLogger(__name__)


class RolloutTable(Callback):
    """Shows answers to the first prompts of the validation split before, during and after training, side by side.

    They are written to ``rollouts.html`` in the run's folder, a page without external files; to TensorBoard (text and
    images, by rollout) if that is the logger; and at the end, before and after, to the terminal. The training is not
    affected: samples depend on counters, not on what was sampled before.

    Args:
        num_prompts: Prompts in the table.
        samples: Answers to each prompt at the training temperature beside the most likely one; 0: none.
        every_n_rollouts: Rollouts between two columns; 0: columns before and after training only.
    """

    def __init__(self, num_prompts: int = 8, samples: int = 2, every_n_rollouts: int = 50) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts is {num_prompts}; it must be at least 1")
        if min(samples, every_n_rollouts) < 0:
            raise ValueError(f"samples is {samples} and every_n_rollouts {every_n_rollouts}; neither may be negative")
        self.num_prompts = num_prompts
        self.samples = samples
        self.every_n_rollouts = every_n_rollouts
        self.path: Path | None = None
        """Page of the present run; None if there is no table."""
        self.moments: list[Moment] = []
        self._uids: list[str] = []
        self._prompts: list[Prompt] = []
        self._images: list[list[str]] = []

    def state_dict(self) -> dict[str, object]:
        """The columns so far, with which a resumed run continues."""
        return {"uids": self._uids, "moments": [dataclasses.asdict(moment) for moment in self.moments]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore the columns."""
        self._uids = list(cast("list[str]", state_dict["uids"]))
        self.moments = [
            Moment(
                record["rollout"],
                [Answer(**answer) for answer in record["greedy"]],
                [[Answer(**answer) for answer in answers] for answers in record["sampled"]],
            )
            for record in cast("list[dict[str, Any]]", state_dict["moments"])
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts and answer them before the first rollout."""
        module = cast(PolicyModule, pl_module)
        loaders = split_loaders(trainer.datamodule, "val")  # type: ignore[attr-defined]
        first = list(islice(chain.from_iterable(batches(loaders)), self.num_prompts))
        prompts = trainer.strategy.broadcast(first)  # every rank answers the same prompts
        directory = run_directory(trainer)  # collective
        self.path = directory / "rollouts.html" if prompts else None
        if self.path is None:
            missing = "the data has no validation split to take prompts from"
            log.warning("RolloutTable: no table is written, because %s", missing)
            return
        uids = [prompt.uid for prompt in prompts]
        if self.moments and uids != self._uids:
            changed = "the validation prompts are not those of the checkpoint"
            log.warning("RolloutTable: %s; earlier columns are dropped", changed)
            self.moments = []
        self._prompts, self._uids = prompts, uids
        self._images = [[page.data_uri(image) for image in prompt.images] for prompt in prompts]
        if self.moments:
            self._write(trainer, module)
        else:
            self._add_column(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Add a column every n rollouts."""
        module = cast(PolicyModule, pl_module)
        if self.every_n_rollouts and module.state.rollouts % self.every_n_rollouts == 0:
            self._add_column(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last column, and print before and after."""
        self._add_column(trainer, cast(PolicyModule, pl_module))
        if self.path is not None and self.moments and trainer.is_global_zero:
            print_before_and_after(self._prompts, self.moments, self.path)

    def _add_column(self, trainer: Trainer, module: PolicyModule) -> None:
        """Answer all prompts, on every rank because weights may have to be gathered, and write them on rank zero."""
        if self.path is None or any(moment.rollout == module.state.rollouts for moment in self.moments):
            return
        evaluate, prompts, samples = module.evaluator.evaluate, self._prompts, self.samples
        greedy = _answers(*evaluate(prompts, stream="table"))
        drawn = _answers(*evaluate(prompts, samples=samples, stream="table")) if samples else []
        sampled = [drawn[p * samples : (p + 1) * samples] for p in range(len(greedy))]
        self.moments.append(Moment(module.state.rollouts, greedy, sampled))
        self._write(trainer, module)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                log_moment(logger, prompts, self.moments[-1], images=len(self.moments) == 1)

    def _write(self, trainer: Trainer, module: PolicyModule) -> None:
        if trainer.is_global_zero and self.path is not None:
            rollouts = module.state.rollouts
            title = f"{type(module).__name__}: answers over {rollouts} rollouts"
            try:
                write_text(self.path, page.render(title, self._prompts, self._images, self.moments))
            except OSError as error:  # the table is not worth ending the run; the next column is written again
                log.warning("RolloutTable: %s was not written after %d rollouts: %s", self.path, rollouts, error)


def log_moment(logger: TensorBoardLogger, prompts: Sequence[Prompt], moment: Moment, *, images: bool) -> None:
    """One text a prompt, indented as a code block, so that TensorBoard does not read answers as Markdown."""
    for p, prompt in enumerate(prompts):
        answers = [moment.greedy[p], *moment.sampled[p]]
        lines = [page.prompt_text(prompt), f"expected: {prompt.answer_text}"]
        for k, answer in enumerate(answers):
            lines += ["", f"{'sampled' if k else 'greedy'}, reward {_reward(answer)}:", answer.text]
        block = "\n".join("    " + line for line in page.printable("\n".join(lines)).splitlines())
        logger.experiment.add_text(f"table/prompt_{p}", block, moment.rollout)
        for k, image in enumerate(prompt.images if images else ()):
            pixels = np.asarray(page.thumbnail(image))
            logger.experiment.add_image(f"table/prompt_{p}/image_{k}", pixels, moment.rollout, dataformats="HWC")


def print_before_and_after(prompts: Sequence[Prompt], moments: Sequence[Moment], path: Path) -> None:
    """First and last column as text, without markup and control characters of the model."""
    first, last = moments[0], moments[-1]
    table = Table(title=f"Most likely answers, rollout {first.rollout} and {last.rollout}", title_justify="left")
    table.add_column("expected", max_width=16)
    for moment in (first, last):
        table.add_column(f"rollout {moment.rollout}", ratio=1)
        table.add_column("reward", justify="right")
    for prompt, before, after in zip(prompts, first.greedy, last.greedy, strict=True):
        cells = [prompt.answer_text, before.text, _reward(before), after.text, _reward(after)]
        one_line = (" ".join(page.printable(cell).split()) for cell in cells)
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in one_line))
    console = get_console()
    console.print(table)
    console.print(Text(f"with images and all columns: {shown(path)}"), soft_wrap=True)


def _answers(rollouts: Sequence[Rollout], output: RewardOutput) -> list[Answer]:
    components = [{name: values[n] for name, values in output.components.items()} for n in range(len(rollouts))]
    return [
        Answer(rollout.text, rollout.finish_reason, reward, parts)
        for rollout, reward, parts in zip(rollouts, output.rewards, components, strict=True)
    ]


def _reward(answer: Answer) -> str:
    return "not scored" if answer.reward is None else f"{answer.reward:.2f}"
