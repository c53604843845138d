"""Keeps secrets out of what a run writes, and control characters out of logs.

A secret belongs in an environment variable that is read where it is used. Two kinds are recognised: values of
environment variables whose names end in ``KEY``, ``TOKEN``, ``SECRET``, ``PASSWORD`` or ``CREDENTIALS``, and values
that stand in a config under a name such as ``api_key``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

HIDDEN = "***"
"""Replaces a secret."""

MIN_CHARS = 8
"""Shorter values are kept: replacing them would change ordinary text."""

_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_OPTION = re.compile(
    r"(^|[_-])(api[_-]?key|(access|private|secret|openai|anthropic|wandb)[_-]key|secret|password|passwd|passphrase|"
    r"credentials?|(access|api|auth|bearer|github|gitlab|hf|hub|refresh)[_-]token)$|^token$",
    re.IGNORECASE,
)


def is_secret(option: str) -> bool:
    """Whether an option of this name holds a secret: ``api_key`` does, ``pad_token`` does not."""
    return _OPTION.search(option) is not None


def redact(value: T, config: object = None) -> T:
    """A copy of a text or a config (mapping, namespace, list) with every secret replaced by ``***``.

    Args:
        value: What is about to be written.
        config: Secrets that stand in this config are replaced as well.
    """
    named = (text for name, text in os.environ.items() if _VARIABLE.search(name))
    secrets = {text for text in (*named, *_secrets(config)) if len(text) >= MIN_CHARS}
    # A secret is also recognised inside the repr or the JSON of a text; longer forms first, as one may contain another.
    forms = {form for text in secrets for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1])}
    return _clean(value, sorted(forms, key=len, reverse=True))


def escaped(text: str) -> str:
    r"""The text on one line: control and format characters are written as escapes, such as ``\x1b`` and ``\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _clean(value: T, secrets: list[str]) -> T:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)  # type: ignore[assignment]
        return value
    if isinstance(value, list | tuple):
        return type(value)(_clean(item, secrets) for item in value)  # type: ignore[return-value]
    fields = _fields(value)
    if fields is None:
        return value
    clean: dict[str, object] = {}
    for name, item in fields.items():  # None and switches are kept, whatever their name
        hidden = is_secret(str(name)) and item is not None and not isinstance(item, bool)
        clean[name] = HIDDEN if hidden else _clean(item, secrets)
    return clean if isinstance(value, Mapping) else type(value)(**clean)  # type: ignore[return-value]


def _secrets(value: object, below_secret: bool = False) -> Iterator[str]:
    """Texts of everything below a secret's name."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, below_secret)
    elif (fields := _fields(value)) is not None:
        for name, item in fields.items():
            yield from _secrets(item, below_secret or is_secret(str(name)))
    elif below_secret and value is not None and not isinstance(value, bool):
        yield str(value)


def _fields(value: object) -> Mapping[str, object] | None:
    """Content of a mapping or of a namespace of argparse or jsonargparse."""
    if isinstance(value, Mapping):
        return value
    return vars(value) if type(value).__name__ == "Namespace" else None
