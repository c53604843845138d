"""Phases of a run, and who is told of them: clocks, memory reports, watchdogs, signals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

from rllava_pl.loop.options import Options


class PhaseObserver(Protocol):
    """Told when a phase begins and ends; what it raises ends the run.

    A callback becomes one in ``setup`` with ``pl_module.observers.append(self)``. Phases: ``rollout``, ``reward``,
    ``evaluate``, ``update``, ``save``, ``validate``, and ``sync`` inside ``rollout`` and ``validate``.
    """

    def phase_begins(self, name: str) -> None:
        """The phase ``name`` is about to begin."""

    def phase_ends(self, name: str, seconds: float) -> None:
        """The phase ``name`` has ended, also by an exception, after ``seconds``."""


class Phases(Options):
    """The clock of ``RLModule``."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage towards ``time/<name>_seconds`` and tell the observers of it."""
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

    def pause(self) -> None:
        """Called between micro-batches; ``Interruption`` may leave the run there."""
