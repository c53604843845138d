"""Usage errors, which are one line on stderr, and what all commands need to make them."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from traceback import walk_tb

DEBUG = "RLLAVA_PL_DEBUG"
"""Environment variable: any value but 0 shows the traceback of an error."""


class UsageError(Exception):
    """A mistake in arguments, a config or data: printed without a traceback, exit code 2."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'epochs' or 'seed'?"``, at most three names; empty if none is close."""
    # Case is the most common slip in class names, and difflib counts it like any other difference.
    originals = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), originals, n=3, cutoff=0.6)
    similarity = {name: difflib.SequenceMatcher(None, name, word.lower()).ratio() for name in close}
    best = [repr(originals[name]) for name in close if similarity[name] > similarity[close[0]] - 0.1]
    listed = f"{', '.join(best[:-1])} or {best[-1]}" if best[1:] else "".join(best)
    return f"; did you mean {listed}?" if best else ""


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is one of this package, whose messages are written for users."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("rllava_pl.")


def with_hint(message: str) -> str:
    """The message and how to see where it comes from."""
    return f"{message}{chr(10) if chr(10) in message else ' '}({DEBUG}=1 shows the traceback)"


def command_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of a command that has options beside those of ``fit``."""
    return argparse.ArgumentParser(
        prog=f"python -m rllava_pl {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
