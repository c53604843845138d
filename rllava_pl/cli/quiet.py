"""Known noise of the libraries, silenced by name: each message with the reason why it does no harm here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = {
    r"The '\w+_dataloader' does not have many workers": "prompts are drawn or read in a fraction of a rollout's time",
    r"Found \d+ module\(s\) in eval mode at the start of training": "the reference policy is in eval mode on purpose",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "Lightning's own use of torch, nothing a user can change",
    r"\s*Option '.*' was expanded to": "an abbreviation, which is refused right after with the full name",
    r"\s*By default only one JsonargparseDeprecationWarning": "the introduction to the above",
    r"The number of training batches \(\d+\) is smaller than the logging interval": "a short run logs every rollout",
}
"""Start of a warning (a regular expression) and why it is not shown."""

LOGS = {
    "litlogger": "an advertisement",
    "litmodels": "an advertisement",
    "Seed set to": "the config says so, and the one saved with the logs",
    "`weights_only` was not set": "about saving: checkpoints of a run hold everything that continuing it takes",
    "got 128002": "Idefics3's default config, which transformers builds to compare with and nobody uses",
}
"""Part of a line of a library's log and why it is not shown."""

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
    "transformers.configuration_utils",
)
"""Where they are logged; a filter acts on the very logger only, not on those below it."""


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the messages named above for the time of a run; everything else is shown."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        for start in WARNINGS:
            warnings.filterwarnings("ignore", message=start)
        for logger in loggers:
            logger.addFilter(_wanted)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in LOGS)
