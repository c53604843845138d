"""Mistakes of the person at the command line, told in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

DEBUG = "RLLAVA_PL_DEBUG"
"""Environment variable: any value but 0 shows the traceback behind an error message."""


class UsageError(Exception):
    """A mistake in arguments, a config or data: printed without a traceback, exit code 2."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'epochs' or 'seed'?"``, at most three names, or nothing if none is close."""
    # Case is the commonest slip in class names, and difflib takes it for as bad as any other.
    originals = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), originals, n=3, cutoff=0.6)
    similarity = {name: difflib.SequenceMatcher(None, name, word.lower()).ratio() for name in close}
    best = [originals[name] for name in close if similarity[name] > similarity[close[0]] - 0.1]
    return f"; did you mean {_either(best)}?" if best else ""


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is one of this package: then the message was written for the person who reads it."""
    frame, traceback = None, error.__traceback__
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("rllava_pl.")


def with_hint(message: str) -> str:
    """The message and how to see where it comes from."""
    return f"{message}{chr(10) if chr(10) in message else ' '}({DEBUG}=1 shows the traceback)"


def _either(names: list[str]) -> str:
    *rest, last = map(repr, names)
    return f"{', '.join(rest)} or {last}" if rest else last
