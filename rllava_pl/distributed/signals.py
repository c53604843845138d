"""Signals that request the end of a run: recorded when they arrive, acted upon where all ranks can stop together.

A handler may run between any two lines of Python, in the middle of an optimizer step or while other ranks wait in a
collective. It therefore only records the signal; the run checks the record where its state can be saved.
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
"""In rising order of precedence: SIGUSR1 (SLURM's requeue) must not be hidden by the SIGTERM that follows it."""
EXIT_CODE = 143
"""What shells and schedulers report for a process that SIGTERM ended."""


class Interrupted(SIGTERMException):
    """Ends the run on every rank, with exit code 143; callbacks get it in ``on_exception`` and may save.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.number = number


class Aborted(Exception):
    """Stops sampling on this rank; the code that catches it calls ``stop_if_signalled`` on all ranks."""


class _Record:
    """The handler, and what it has received in this process."""

    def __init__(self) -> None:
        self.received = 0
        """0, or 1 + the position of the signal in ``WATCHED``."""
        self.process = 0
        self.earlier: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a child that was forked later has the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = max(self.received, 1 + WATCHED.index(signal.Signals(number)))


_record = _Record()


def install_handlers() -> None:
    """Install the handler, in the main thread only; ``call_previous_handler`` has the handlers that it replaces."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not _record:  # a validation inside a fit must not clear the record
        _record.received, _record.process = 0, os.getpid()
        _record.earlier = {number: signal.signal(number, _record) for number in WATCHED}


def abort_if_signalled() -> None:
    """Raise ``Aborted`` if this process has received a signal; stops sampling on this rank alone."""
    if _record.received:
        raise Aborted


def stop_if_signalled() -> None:
    """Raise ``Interrupted`` on all ranks if any of them has received a signal; collective."""
    if received := max(gather_objects(_record.received)):
        raise Interrupted(WATCHED[received - 1])


def call_previous_handler(number: int) -> None:
    """Call the handler that was installed before, such as Lightning's, which requeues a SLURM job."""
    earlier = _record.earlier.get(number)
    if callable(earlier):
        cast("Callable[[int, FrameType | None], object]", earlier)(number, None)
