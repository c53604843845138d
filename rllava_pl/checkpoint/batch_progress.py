"""Lightning's counters of batches in a checkpoint, set so that what was under way begins from its start.

Lightning counts each batch as ready, started, processed and completed, and tells from the four where a run was saved.
Of a validation that was cut short it would do the rest only, whose scores are not those of the whole; one that was due
it would leave out; a training batch that was cut short it would count twice, so that later validations come early.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

Counts = dict[str, Any]
"""``total`` and ``current`` (in the epoch), each with ``ready``, ``started``, ``processed`` and ``completed``; and
``is_last_batch``."""


def begin_anew(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Change the counters of a checkpoint in place.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        trainer: Says when a validation is due.
    """
    training: Counts = fit_loop["epoch_loop.batch_progress"]
    validation: Counts = fit_loop["epoch_loop.val_loop.batch_progress"]
    now = training["current"]
    due = _validates_after(training, trainer)
    if now["started"] > now["processed"]:  # in a training step
        _complete(training)
        training["is_last_batch"] = False  # it would end the epoch without it
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= due  # Lightning adds it once more
    elif validation["current"]["started"] > validation["current"]["completed"]:  # in a validation
        _first_batch_of(validation, before=validation["current"]["completed"])
    elif now["processed"] > now["completed"] and due:  # between a training step and its validation
        _complete(training)
        validation["current"] = dict.fromkeys(validation["current"], 0)
        _first_batch_of(validation, before=0)


def _first_batch_of(validation: Counts, before: int) -> None:
    """A validation in its first batch, in which Lightning begins it; ``before`` batches of it are forgotten."""
    for counts in (validation["total"], validation["current"]):
        done = counts["completed"] - before
        _set(counts, begun=done + 1, done=done)


def _complete(training: Counts) -> None:
    """What was processed is completed, and nothing has begun since."""
    for counts in (training["total"], training["current"]):
        _set(counts, begun=counts["processed"], done=counts["processed"])


def _set(counts: dict[str, int], begun: int, done: int) -> None:
    counts.update(ready=begun, started=begun, processed=done, completed=done)


def _validates_after(training: Counts, trainer: Trainer) -> bool:
    """Whether a validation follows the last batch that was processed."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    if epochs is None:
        return training["total"]["processed"] % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and training["current"]["processed"] % every == 0
