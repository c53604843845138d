"""Secrets are kept out of everything that a run writes.

A secret belongs into an environment variable, read where it is used. Two kinds are known here: values of environment
variables whose names say so (``..._API_KEY``, ``..._TOKEN``, ``..._SECRET``, ``..._PASSWORD``), and those that
somebody has put into a config after all, under such a name. Texts of datasets, models and rewards are hostile: what
goes into a log of them is ``escaped``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

HIDDEN = "***"
"""Stands in the place of a secret."""

MIN_CHARS = 8
"""A shorter value is no secret, and hiding it would tear holes into ordinary text."""

_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_OPTION = re.compile(
    r"(^|[_-])(api[_-]?key|(access|private|secret|openai|anthropic|wandb)[_-]key|secret|password|passwd|passphrase|"
    r"credentials?|(access|api|auth|bearer|github|gitlab|hf|hub|refresh)[_-]token)$|^token$",
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
    secrets = [secret for secret in {*named, *_given} if len(secret) >= MIN_CHARS]
    for written in sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True):
        text = text.replace(written, HIDDEN)
    return text


def escaped(text: str) -> str:
    r"""On one line: what a terminal or a reader of logs would act on is written as an escape, ``\x1b`` or ``\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


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
    """No log record, warning or stray error of this time, by whatever library, holds a secret."""
    make = logging.getLogRecordFactory()

    def made(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments is its handler's business
            record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[1]:
            record.exc_text = traceback_text(record.exc_info[1]).rstrip()
        return record

    def of_warning(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401
        return redact(as_warning(*args, **kwargs))

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else "unknown"
            sys.stderr.write(f"Exception in thread {name}:\n{traceback_text(args.exc_value)}")

    def of_destructor(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is not None:
            sys.stderr.write(redact(f"Exception ignored in {args.object!r}:\n") + traceback_text(args.exc_value))

    as_warning = warnings.formatwarning
    with ExitStack() as hooks:
        hooks.callback(logging.setLogRecordFactory, make)
        logging.setLogRecordFactory(made)
        for owner, name, hook in (
            (warnings, "formatwarning", of_warning),
            (threading, "excepthook", of_thread),
            (sys, "unraisablehook", of_destructor),
        ):
            hooks.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, hook)
        yield


def _secrets(config: object) -> Iterator[str]:
    if isinstance(config, list | tuple):
        for part in config:
            yield from _secrets(part)
    elif isinstance(config, Mapping) or _is_namespace(config):
        for name, x in (config if isinstance(config, Mapping) else vars(config)).items():
            yield from _texts(x) if _holds_secret(name, x) else _secrets(x)


def _holds_secret(name: object, x: object) -> bool:
    """Whatever stands under such a name is hidden, but that there is nothing, or a choice, is not."""
    return isinstance(name, str) and is_secret(name) and x is not None and not isinstance(x, bool)


def _texts(x: object) -> Iterator[str]:
    """All that stands below a secret's name, as it would be written."""
    if isinstance(x, Mapping) or _is_namespace(x):
        for value in (x if isinstance(x, Mapping) else vars(x)).values():
            yield from _texts(value)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from _texts(value)
    elif x is not None and not isinstance(x, bool):
        yield str(x)


def _forms(secret: str) -> set[str]:
    """A secret as it is, within ``repr`` and within JSON."""
    return {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}


def _is_namespace(x: object) -> bool:
    return type(x).__name__ == "Namespace"  # of argparse or jsonargparse
