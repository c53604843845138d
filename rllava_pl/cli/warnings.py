"""Warnings and log lines of the libraries that are not shown, each with the reason why it does no harm here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = {
    r"The '\w+_dataloader' does not have many workers": "prompts are read in a fraction of a rollout's time",
    r"Found \d+ module\(s\) in eval mode at the start of training": "the reference policy is in eval mode on purpose",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "Lightning's own use of torch, which users cannot change",
    r"\s*Option '.*' was expanded to": "an abbreviation, which is refused right after with the full name",
    r"\s*By default only one JsonargparseDeprecationWarning": "the introduction to the above",
    r"The number of training batches \(\d+\) is smaller than the logging interval": "a short run logs every rollout",
}
"""Start of a warning (a regular expression) and why it is not shown."""

LOGS = {
    "litlogger": "an advertisement",
    "litmodels": "an advertisement",
    "Seed set to": "the config has it, and the one saved with the logs",
    "`weights_only` was not set": "about saving: a checkpoint holds everything that resuming needs",
    "got 128002": "Idefics3's default config, which transformers builds for a comparison only",
}
"""Part of a log line of a library and why it is not shown."""

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
    "transformers.configuration_utils",
)
"""Where they are logged; a filter does not act on the loggers below."""


@contextmanager
def filter_warnings() -> Iterator[None]:
    """Leave out the messages named above; everything else is shown."""

    def is_shown(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in LOGS)

    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        for start in WARNINGS:
            warnings.filterwarnings("ignore", message=start)
        for logger in loggers:
            logger.addFilter(is_shown)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(is_shown)
