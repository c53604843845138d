"""Ends a run that hangs, and reports where."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import traceback
from collections import defaultdict, deque
from statistics import median
from time import monotonic, sleep
from types import MappingProxyType
from typing import NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.distributed.collectives import rank, world_size
from rllava_pl.distributed.failure_detector import FailureDetector, Message
from rllava_pl.modules import PolicyModule
from rllava_pl.redaction import escaped, redact

log = logging.getLogger(__name__)

EXIT_CODES = MappingProxyType(
    {"between": 80, "rollout": 81, "reward": 82, "logprobs": 83, "update": 84, "sync": 85, "save": 86, "validate": 87}
)
"""Of a phase that took too long; ``between``: outside of all phases, e.g. in the data loader."""
OTHER_PHASE = 89
"""A phase that a subclass adds took too long."""
LOST = 88
"""Another rank died or failed."""
RECENT = 20
"""Number of last durations of a phase whose median is its usual duration."""

GRACE_SECONDS = 20.0
"""In which a rank may fail with the same error as another rank."""


class WatchedPhase(NamedTuple):
    """A phase that is running."""

    name: str
    since: float
    limit_seconds: float


class Watchdog(Callback):
    """Ends the process when a phase takes far longer than usual or another rank has died, and reports where.

    The report on standard error names phase, rollout, rank, seconds and the prompts that the engine has not answered,
    with the stacks of all threads; the other ranks print their own. The exit code tells the phase (``EXIT_CODES``), so
    that a scheduler can restart the run from its last checkpoint. A phase has no limit while a debugger holds the main
    thread.

    Args:
        factor: Limit of a phase as a multiple of the median of its last twenty durations.
        floor_seconds: Smallest limit.
        first_seconds: Limit of the first time of each phase, which includes loading and compiling, and of the time
            between phases.
        deadlines: Limits in seconds by phase, in place of all of these.
    """

    def __init__(
        self,
        factor: float = 10.0,
        floor_seconds: float = 60.0,
        first_seconds: float = 3600.0,
        deadlines: dict[str, float] | None = None,
    ) -> None:
        if min(factor, floor_seconds, first_seconds) <= 0:
            limits = f"factor ({factor}), floor_seconds ({floor_seconds}) and first_seconds ({first_seconds})"
            raise ValueError(f"{limits} must be positive")
        if unknown := sorted(set(deadlines or {}) - set(EXIT_CODES)):
            raise ValueError(f"deadlines: there is no phase {unknown[0]!r}; the phases are {', '.join(EXIT_CODES)}")
        self.factor = factor
        self.floor_seconds = floor_seconds
        self.first_seconds = first_seconds
        self.deadlines = dict(deadlines or {})
        self._times: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._phases: list[WatchedPhase] = []
        self._failure_detector: FailureDetector | None = None
        self._lost = threading.Event()
        self._stopped = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect to the other ranks. Collective."""
        if world_size() > 1 and self._failure_detector is None:
            try:
                self._failure_detector = FailureDetector(self._on_message, machines=trainer.num_nodes)
            except OSError as error:
                log.warning("ranks are not connected, so the failure of one is not reported to the others: %s", error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread that checks the limits."""
        self._module = cast(PolicyModule, pl_module)
        self._module.phases.observers.append(self)
        self._phases = [self._phase("between")]
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(self._stopped,), name="watchdog", daemon=True).start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop: what follows is not part of the loop."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the error to the other ranks; exit with ``LOST`` if the death of another rank caused it."""
        self._stop()
        if self._failure_detector is None or not isinstance(exception, Exception):
            return
        text = escaped(redact(f"{type(exception).__name__}: {exception}"))[:500]
        self._failure_detector.send(Message("failed", rank(), text, LOST))
        if isinstance(exception, RuntimeError) and self._lost.wait(2.0):  # collectives of torch raise this
            sys.stderr.write(redact("".join(traceback.format_exception(exception))))
            _exit(LOST)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disconnect from the other ranks."""
        self._stop()
        if self._failure_detector is not None:
            self._failure_detector.close()
            self._failure_detector = None

    def _stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()
        if self._phases:
            self._phases = []
            self._module.phases.observers.remove(self)

    def phase_begins(self, name: str) -> None:
        """Start the clock of a phase."""
        self._phases = [*self._phases, self._phase(name)]

    def phase_ends(self, name: str, seconds: float) -> None:
        """Record the duration; the time between phases starts here."""
        self._times[name].append(seconds)
        outer = self._phases[:-1]
        self._phases = outer if len(outer) > 1 else [self._phase("between")]

    def _phase(self, name: str) -> WatchedPhase:
        return WatchedPhase(name, monotonic(), self.limit(name))

    def limit(self, name: str) -> float:
        """Seconds that the phase may take now."""
        if name in self.deadlines:
            return self.deadlines[name]
        if not self._times[name]:
            return max(self.first_seconds, self.floor_seconds)
        return max(self.factor * median(self._times[name]), self.floor_seconds)

    def _watch(self, stopped: threading.Event) -> None:
        """Check the limits until ``stopped``."""
        while not stopped.wait(min(1.0, self.floor_seconds / 4)):
            if not (phases := self._phases):
                continue
            late = next((phase for phase in reversed(phases) if monotonic() - phase.since > phase.limit_seconds), None)
            if late is not None and not _in_debugger():
                self._on_timeout(late)
            # If the main thread holds the interpreter's lock, this thread never runs again, and faulthandler exits.
            left = min(phase.since + phase.limit_seconds for phase in phases) - monotonic()
            faulthandler.dump_traceback_later(max(left, 0.0) + self.floor_seconds, exit=True)

    def _on_timeout(self, phase: WatchedPhase) -> None:
        seconds = monotonic() - phase.since
        text = (
            f"phase {phase.name!r} of rollout {self._module.state.rollouts} has taken {seconds:.0f} s, its limit is "
            f"{phase.limit_seconds:.0f} s"
        )
        if waiting := self._module.engine.pending:
            text += f"; the engine has not answered for {', '.join(waiting[:8])}" + (", ..." if waiting[8:] else "")
        _report(f"rank {rank()}: {text}", stacks=True)
        code = EXIT_CODES.get(phase.name, OTHER_PHASE)
        if self._failure_detector is not None:
            self._failure_detector.send(Message("stalled", rank(), text, code))
        _exit(code)

    def _on_message(self, message: Message) -> None:
        """Exit after a failure of another rank; called in the thread of the failure detector."""
        if message.kind == "stalled":
            _report(f"rank {rank()}: rank {message.rank} says: {message.text}", stacks=True)
            _exit(message.code)
        if message.kind == "gone":
            _report(f"rank {rank()}: rank {message.rank} is gone: its process was killed or crashed{self._where}")
            self._lost.set()
            sleep(3.0)  # the main thread may report the error that this caused
        elif self._stopped.wait(1.0):  # this rank has failed as well
            return
        else:
            _report(f"rank {rank()}: rank {message.rank} failed: {message.text}{self._where}")
            if self._stopped.wait(GRACE_SECONDS):
                return
        _exit(LOST)

    @property
    def _where(self) -> str:
        return f"; phase {self._phases[-1].name!r} of rollout {self._module.state.rollouts}" if self._phases else ""


def _report(text: str, *, stacks: bool = False) -> None:
    """Write to standard error directly, since other threads may hold Python's buffers and locks."""
    os.write(2, f"\n[watchdog] {redact(text)}\n".encode())
    if stacks:
        faulthandler.dump_traceback(2)


def _exit(code: int) -> None:
    """Exit at once, without cleaning up what may hang."""
    sleep(0.5)  # messages to the other ranks are delivered
    os._exit(code)


def _in_debugger() -> bool:
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return any(frame.f_globals.get("__name__") in ("bdb", "pdb") for frame, _ in traceback.walk_stack(main))
