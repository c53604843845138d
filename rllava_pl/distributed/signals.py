"""Signals that ask a run to leave: noted when they come, acted upon where all ranks can leave together.

A handler may run between any two lines of Python, in the middle of an optimizer step or while other ranks wait in a
collective. So it only takes a note; the run looks at the note at places where its state can be saved.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

from lightning.pytorch.utilities.exceptions import SIGTERMException

from rllava_pl.distributed.collectives import gather_objects

WATCHED = (signal.SIGTERM, signal.SIGUSR1) if os.name == "posix" else (signal.SIGTERM,)
"""In rising order of precedence: a requeue (SIGUSR1, from SLURM) must not get lost behind the SIGTERM that follows."""
EXIT_CODE = 143
"""What shells and schedulers know as "ended by SIGTERM"."""


class Interrupted(SIGTERMException):
    """Ends the run on every rank, with exit code 143; callbacks see it in ``on_exception`` and may save.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.number = number


class Aborted(Exception):
    """Stops this rank's sampling; whoever catches it asks the other ranks with ``leave_if_asked``."""


class _Note:
    """What the handlers of this process have seen."""

    def __init__(self) -> None:
        self.seen = 0
        """0, or 1 + the place of the signal in ``WATCHED``."""
        self.process = 0
        self.earlier: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a child that was forked since: not its note
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.seen = max(self.seen, 1 + WATCHED.index(signal.Signals(number)))


_note = _Note()


def watch() -> None:
    """Take notes from now on; what was installed before is kept for ``pass_on``. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not _note:  # a validation inside a fit must not lose the note
        _note.seen, _note.process = 0, os.getpid()
        _note.earlier = {number: signal.signal(number, _note) for number in WATCHED}


def asked() -> bool:
    """Whether a signal has come to this process."""
    return _note.seen > 0


def abort_if_asked() -> None:
    """Stop sampling on this rank alone.

    Raises:
        Aborted: A signal has come.
    """
    if asked():
        raise Aborted


def leave_if_asked() -> None:
    """Leave on all ranks if a signal has come to any of them. Collective.

    Raises:
        Interrupted: It has.
    """
    if seen := max(gather_objects(_note.seen)):
        raise Interrupted(WATCHED[seen - 1])


def pass_on(number: int) -> None:
    """Call the handler that was there before, such as Lightning's, which puts a SLURM job back into its queue."""
    earlier = _note.earlier.get(number)
    if callable(earlier):
        cast("Callable[[int, FrameType | None], object]", earlier)(number, None)
