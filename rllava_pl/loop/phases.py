"""Phases of a pass: seconds of each, and observers such as watchdogs and memory reports."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol, Self

from rllava_pl.loop.interruption import Interruption


class PhaseObserver(Protocol):
    """Called when a phase begins and ends; what it raises ends the run.

    A callback becomes one in ``setup`` with ``pl_module.phases.observers.append(self)``. Phases: ``rollout``,
    ``reward``, ``logprobs``, ``update``, ``save``, ``validate``, and ``sync`` inside ``rollout`` and ``validate``.
    """

    def phase_begins(self, name: str) -> None:
        """The phase ``name`` is about to begin."""

    def phase_ends(self, name: str, seconds: float) -> None:
        """The phase ``name`` has ended, also by an exception, after ``seconds``."""


class Phases:
    """Times phases and notifies observers: ``with phases("rollout"): ...``.

    Args:
        interruption: Ends the run before a phase if a signal has arrived.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.observers: list[PhaseObserver] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to ``seconds[name]``."""
        self.interruption.phase_begins(name)
        for observer in self.observers:
            observer.phase_begins(name)
        start = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - start
            self.seconds[name] += seconds
            for observer in self.observers:
                observer.phase_ends(name, seconds)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy of a module is not observed: observers hold threads and connections."""
        return type(self)(copy.deepcopy(self.interruption, memo))
