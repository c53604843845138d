"""Secrets are kept out of everything that a run writes.

A secret belongs into an environment variable, read where it is used. Two kinds are known here: values of environment
variables whose names say so (``..._API_KEY``, ``..._TOKEN``, ``..._SECRET``, ``..._PASSWORD``), and those that
somebody has put into a config after all, under such a name.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

HIDDEN = "***"
"""Stands in the place of a secret."""

MIN_CHARS = 8
"""A shorter value is no secret, and hiding it would tear holes into ordinary text."""

_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_OPTION = re.compile(
    r"(^|_)(api_?key|access_key|private_key|secret_key|secret|password|passwd|passphrase|credentials?|"
    r"(access|api|auth|bearer|hf|hub|refresh)_token)$|^token$",
    re.IGNORECASE,
)
_given: set[str] = set()


def is_secret(option: str) -> bool:
    """Whether an option of this name holds a secret: ``api_key`` does, ``pad_token`` does not."""
    return _OPTION.search(option) is not None


def hide(config: object) -> None:
    """Remember the secrets that stand in a config, so that ``redact`` finds them in other texts."""
    _given.update(_secrets(config))


def redact(text: str) -> str:
    """The text with every known secret replaced."""
    named = (value for name, value in os.environ.items() if _VARIABLE.search(name))
    for secret in sorted({*named, *_given}, key=len, reverse=True):
        if len(secret) >= MIN_CHARS:
            text = text.replace(secret, HIDDEN)
    return text


def redacted(config: object) -> object:
    """A copy of a config (mappings, namespaces, lists) without its secrets."""
    if isinstance(config, str):
        return redact(config)
    if isinstance(config, list | tuple):
        return type(config)(map(redacted, config))
    if not isinstance(config, Mapping) and not _is_namespace(config):
        return config
    fields = config if isinstance(config, Mapping) else vars(config)
    clean = {name: HIDDEN if _holds_secret(name, x) else redacted(x) for name, x in fields.items()}
    return clean if isinstance(config, Mapping) else type(config)(**clean)


def traceback_text(error: BaseException) -> str:
    """The traceback as Python prints it, without secrets."""
    return redact("".join(traceback.format_exception(error)))


@contextmanager
def redacted_logs() -> Iterator[None]:
    """No log record that is made in this time, by whatever library, holds a secret."""
    make = logging.getLogRecordFactory()

    def made(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments is its handler's business
            record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[1]:
            record.exc_text = traceback_text(record.exc_info[1]).rstrip()
        return record

    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def _secrets(config: object) -> Iterator[str]:
    if isinstance(config, list | tuple):
        for part in config:
            yield from _secrets(part)
    elif isinstance(config, Mapping) or _is_namespace(config):
        for name, x in (config if isinstance(config, Mapping) else vars(config)).items():
            if _holds_secret(name, x):
                yield x
            else:
                yield from _secrets(x)


def _holds_secret(name: object, x: object) -> bool:
    return isinstance(x, str) and isinstance(name, str) and is_secret(name)


def _is_namespace(x: object) -> bool:
    return type(x).__name__ == "Namespace"  # of argparse or jsonargparse
