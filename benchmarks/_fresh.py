"""A separate process for every measurement, and the peak of its memory, from Linux."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def fresh(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function in a fork of this process, which must have computed nothing but imports so far."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def forget_peak() -> float:
    """Bytes the process holds now; where Linux allows it, its peak is set back to that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> float:
    """Most bytes the process has held since."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return float(line.split()[1]) * 1024
