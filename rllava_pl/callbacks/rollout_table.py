"""Answers to the same few prompts during training, as a page for people to read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.callbacks import rollout_page as page
from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.callbacks.rollout_page import Answer, Moment
from rllava_pl.callbacks.splits import batches, split_loaders
from rllava_pl.checkpoint.atomic import write_text
from rllava_pl.rewards import RewardOutput
from rllava_pl.types import Prompt, Rollout

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rllava_pl.modules import PolicyModule

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
        self.moments = [_moment(**record) for record in cast("list[dict[str, Any]]", state_dict["moments"])]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts and answer them before the first rollout."""
        module = cast("PolicyModule", pl_module)
        loaders = split_loaders(trainer.datamodule, "val")  # type: ignore[attr-defined]
        first = list(islice(chain.from_iterable(batches(loaders)), self.num_prompts))
        prompts = trainer.strategy.broadcast(first)  # every rank answers the same prompts
        directory = run_directory(trainer)  # collective
        self.path = directory / "rollouts.html" if prompts else None
        if self.path is None:
            log.warning(
                "RolloutTable: no table is written, because the data has no validation split to take prompts from"
            )
            return
        self._use(prompts)
        if self.moments:
            self._write(trainer, module)
        else:
            self._add_column(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Add a column every n rollouts."""
        module = cast("PolicyModule", pl_module)
        if self.every_n_rollouts and module.state.rollouts % self.every_n_rollouts == 0:
            self._add_column(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last column, and print before and after."""
        self._add_column(trainer, cast("PolicyModule", pl_module))
        if self.path is not None and self.moments and trainer.is_global_zero:
            print_before_and_after(self._prompts, self.moments, self.path)

    def _use(self, prompts: list[Prompt]) -> None:
        """Use these prompts; restored columns are kept only if they belong to the same ones."""
        uids = [prompt.uid for prompt in prompts]
        if self.moments and uids != self._uids:
            log.warning(
                "RolloutTable: the validation prompts are not those of the checkpoint; earlier columns are dropped"
            )
            self.moments = []
        self._prompts, self._uids = prompts, uids
        self._images = [[page.data_uri(image) for image in prompt.images] for prompt in prompts]

    def _add_column(self, trainer: Trainer, module: PolicyModule) -> None:
        """Answer all prompts, on every rank because weights may have to be gathered, and write them on rank zero."""
        if self.path is None or any(moment.rollout == module.state.rollouts for moment in self.moments):
            return
        greedy = _answers(*module.evaluator.evaluate(self._prompts, stream="table"))
        drawn = (
            _answers(*module.evaluator.evaluate(self._prompts, samples=self.samples, stream="table"))
            if self.samples
            else []
        )
        sampled = [drawn[p * self.samples : (p + 1) * self.samples] for p in range(len(greedy))]
        self.moments.append(Moment(module.state.rollouts, greedy, sampled))
        self._write(trainer, module)
        self._log(trainer)

    def _write(self, trainer: Trainer, module: PolicyModule) -> None:
        if trainer.is_global_zero and self.path is not None:
            title = f"{type(module).__name__}: answers over {module.state.rollouts} rollouts"
            text = page.render(title, self._prompts, self._images, self.moments)
            try:
                write_text(self.path, text)
            except OSError as error:  # the table is not worth ending the run; the next column is written again
                log.warning(
                    "RolloutTable: %s was not written after %d rollouts: %s", self.path, module.state.rollouts, error
                )

    def _log(self, trainer: Trainer) -> None:
        """The newest column to TensorBoard, images with the first one."""
        from lightning.pytorch.loggers import TensorBoardLogger

        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                log_moment(logger.experiment, self._prompts, self.moments[-1], images=len(self.moments) == 1)


def log_moment(writer: SummaryWriter, prompts: Sequence[Prompt], moment: Moment, *, images: bool) -> None:
    """One text a prompt, indented as a code block, so that TensorBoard does not read answers as Markdown."""
    import numpy as np

    for p, prompt in enumerate(prompts):
        answers = [moment.greedy[p], *moment.sampled[p]]
        lines = [page.prompt_text(prompt), f"expected: {prompt.answer_text}"]
        for k, answer in enumerate(answers):
            lines += ["", f"{'sampled' if k else 'greedy'}, {_reward(answer)}:", answer.text]
        block = "\n".join("    " + line for line in page.printable("\n".join(lines)).splitlines())
        writer.add_text(f"table/prompt_{p}", block, moment.rollout)
        for k, image in enumerate(prompt.images if images else ()):
            pixels = np.asarray(page.thumbnail(image))
            writer.add_image(f"table/prompt_{p}/image_{k}", pixels, moment.rollout, dataformats="HWC")


def print_before_and_after(prompts: Sequence[Prompt], moments: Sequence[Moment], path: Path) -> None:
    """First and last column as text, without markup and control characters of the model."""
    from rich import get_console
    from rich.table import Table
    from rich.text import Text

    first, last = moments[0], moments[-1]
    table = Table(title=f"Most likely answers, rollout {first.rollout} and {last.rollout}", title_justify="left")
    table.add_column("expected", max_width=16)
    for moment in (first, last):
        table.add_column(f"rollout {moment.rollout}", ratio=1)
        table.add_column("reward", justify="right")
    for prompt, before, after in zip(prompts, first.greedy, last.greedy, strict=True):
        cells = [prompt.answer_text, before.text, _number(before), after.text, _number(after)]
        table.add_row(*(Text(_one_line(cell), no_wrap=True, overflow="ellipsis") for cell in cells))
    console = get_console()
    console.print(table)
    console.print(Text(f"with images and all columns: {shown(path)}"), soft_wrap=True)


def _answers(rollouts: Sequence[Rollout], output: RewardOutput) -> list[Answer]:
    return [
        Answer(
            rollout.text,
            rollout.finish_reason,
            output.rewards[n],
            {name: values[n] for name, values in output.components.items()},
        )
        for n, rollout in enumerate(rollouts)
    ]


def _moment(rollout: int, greedy: list[dict[str, Any]], sampled: list[list[dict[str, Any]]]) -> Moment:
    """Read the state of a checkpoint."""
    drawn = [[Answer(**answer) for answer in answers] for answers in sampled]
    return Moment(rollout, [Answer(**answer) for answer in greedy], drawn)


def _number(answer: Answer) -> str:
    return "–" if answer.reward is None else f"{answer.reward:.2f}"


def _reward(answer: Answer) -> str:
    return "not scored" if answer.reward is None else f"reward {answer.reward:.2f}"


def _one_line(text: str) -> str:
    return " ".join(page.printable(text).split())
