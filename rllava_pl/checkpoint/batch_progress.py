"""Lightning's batch counters in a checkpoint, changed so that an interrupted step or validation is repeated as a whole.

Lightning counts each batch as ready, started, processed and completed, and derives from the four where a run was saved.
On resume it would run only the rest of an interrupted validation, whose scores are not those of all rows; it would skip
a validation that was due; and it would count an interrupted training batch twice, so that later validations are early.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

Counts = dict[str, Any]
"""``total`` and ``current`` (in the epoch), each with ``ready``, ``started``, ``processed`` and ``completed``; and
``is_last_batch``."""


def restart_interrupted(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Change the counters of a checkpoint in place.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        trainer: Its settings decide when a validation is due.
    """
    training: Counts = fit_loop["epoch_loop.batch_progress"]
    validation: Counts = fit_loop["epoch_loop.val_loop.batch_progress"]
    now = training["current"]
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    due = False  # whether a validation follows the last processed batch
    if trainer.enable_validation and isinstance(every, int):
        counted = training["total"] if epochs is None else now
        due = counted["processed"] % every == 0 and (epochs is None or (trainer.current_epoch + 1) % epochs == 0)
    if now["started"] > now["processed"]:  # in a training step
        _complete(training)
        training["is_last_batch"] = False  # it would end the epoch without this batch
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= due  # Lightning adds it again
    elif validation["current"]["started"] > validation["current"]["completed"]:  # in a validation
        _restart_validation(validation, done=validation["current"]["completed"])
    elif now["processed"] > now["completed"] and due:  # between a training step and its validation
        _complete(training)
        validation["current"] = dict.fromkeys(validation["current"], 0)
        _restart_validation(validation, done=0)


def _restart_validation(validation: Counts, done: int) -> None:
    """In its first batch, where Lightning restarts a validation; its ``done`` batches are no longer counted."""
    for counts in (validation["total"], validation["current"]):
        completed = counts["completed"] - done
        counts.update(ready=completed + 1, started=completed + 1, processed=completed, completed=completed)


def _complete(training: Counts) -> None:
    """Every processed batch is completed, and no other has started."""
    for counts in (training["total"], training["current"]):
        counts.update(dict.fromkeys(("ready", "started", "completed"), counts["processed"]))
