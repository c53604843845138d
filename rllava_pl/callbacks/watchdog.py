"""Ends a run that hangs, and says where."""

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
from rllava_pl.distributed.failure_detector import Peers, Word
from rllava_pl.modules.base import RLModule
from rllava_pl.redaction import escaped, redact

log = logging.getLogger(__name__)

EXIT_CODES = MappingProxyType(
    {
        "between": 80,
        "rollout": 81,
        "reward": 82,
        "evaluate": 83,
        "update": 84,
        "sync": 85,
        "save": 86,
        "validate": 87,
    }
)
"""Of a phase that took too long; ``between``: outside of any, e.g. in the data loader."""
OWN_PHASE = 89
"""A phase that only a subclass knows took too long."""
LOST = 88
"""Another rank died or failed."""
RECENT = 20
"""Last times of a phase, whose median says how long it takes."""

GRACE_SECONDS = 20.0
"""For a rank to feel by itself what another one failed with."""


class Phase(NamedTuple):
    """A phase under watch."""

    name: str
    since: float
    limit_seconds: float


class Watchdog(Callback):
    """Ends the process when a phase takes far longer than usual, or another rank has died, and says which and where.

    A run that hangs costs as much as one that works. The report on standard error names phase, rollout, rank, seconds
    and the prompts that the engine had not answered, with the stacks of all threads; the other ranks print theirs. The
    exit code says which phase it was (``EXIT_CODES``), so that a scheduler can start the run again from its last
    checkpoint. A debugger that holds the main thread stops the clock.

    Args:
        factor: A phase may take this many times the median of its last twenty times.
        floor_seconds: It may always take so long.
        first_seconds: Limit of the first time of each phase (loading, compiling), and of what lies between phases.
        deadlines: Limits in seconds by phase, instead of these.
    """

    def __init__(
        self,
        factor: float = 10.0,
        floor_seconds: float = 60.0,
        first_seconds: float = 3600.0,
        deadlines: dict[str, float] | None = None,
    ) -> None:
        if min(factor, floor_seconds, first_seconds) <= 0:
            raise ValueError(
                f"factor ({factor}), floor_seconds ({floor_seconds}) and first_seconds ({first_seconds}) must be "
                "positive"
            )
        if unknown := sorted(set(deadlines or {}) - set(EXIT_CODES)):
            raise ValueError(f"deadlines: there is no phase {unknown[0]!r}; there are {', '.join(EXIT_CODES)}")
        self.factor = factor
        self.floor_seconds = floor_seconds
        self.first_seconds = first_seconds
        self.deadlines = dict(deadlines or {})
        self._times: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._phases: list[Phase] = []
        self._peers: Peers | None = None
        self._lost = threading.Event()
        self._stopped = threading.Event()

    # -- the run ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take up the line to the other ranks. Collective."""
        if world_size() > 1 and self._peers is None:
            try:
                self._peers = Peers(self._hear, machines=trainer.num_nodes)
            except OSError as error:
                log.warning("no line between ranks, the death of one is not told to the others: %s", error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._module = cast(RLModule, pl_module)
        self._module.observers.append(self)
        self._phases = [self._phase("between")]
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(self._stopped,), name="watchdog", daemon=True).start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes now is no longer a loop with usual times."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks; if it is another rank's death that is felt here, say whose."""
        self._stop()
        if self._peers is None or not isinstance(exception, Exception):
            return
        text = escaped(redact(f"{type(exception).__name__}: {exception}"))[:500]
        self._peers.say(Word("failed", rank(), text, LOST))
        if isinstance(exception, RuntimeError) and self._lost.wait(2.0):  # torch's collectives raise no other
            sys.stderr.write(redact("".join(traceback.format_exception(exception))))
            _exit(LOST)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the line."""
        self._stop()
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    def _stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()
        if self._phases:
            self._phases = []
            self._module.observers.remove(self)

    # -- phases -------------------------------------------------------------------------------------------------------

    def phase_begins(self, name: str) -> None:
        """Start its clock."""
        self._phases = [*self._phases, self._phase(name)]

    def phase_ends(self, name: str, seconds: float) -> None:
        """Remember how long it took; what comes next begins now."""
        self._times[name].append(seconds)
        outer = self._phases[:-1]
        self._phases = outer if len(outer) > 1 else [self._phase("between")]

    def _phase(self, name: str) -> Phase:
        return Phase(name, monotonic(), self.limit(name))

    def limit(self, name: str) -> float:
        """Seconds that the phase may take now."""
        if name in self.deadlines:
            return self.deadlines[name]
        if not self._times[name]:
            return max(self.first_seconds, self.floor_seconds)
        return max(self.factor * median(self._times[name]), self.floor_seconds)

    def _watch(self, stopped: threading.Event) -> None:
        """Look at the clock until told to stop."""
        while not stopped.wait(min(1.0, self.floor_seconds / 4)):
            if not (phases := self._phases):
                continue
            late = next((phase for phase in reversed(phases) if monotonic() - phase.since > phase.limit_seconds), None)
            if late is not None and not _in_debugger():
                self._bark(late)
            # If the main thread holds the interpreter's lock, this one never runs again, and C code ends the process.
            left = min(phase.since + phase.limit_seconds for phase in phases) - monotonic()
            faulthandler.dump_traceback_later(max(left, 0.0) + self.floor_seconds, exit=True)

    def _bark(self, phase: Phase) -> None:
        seconds = monotonic() - phase.since
        told = (
            f"phase {phase.name!r} of rollout {self._module.rollout_index} has taken {seconds:.0f} s, its limit is "
            f"{phase.limit_seconds:.0f} s"
        )
        if waiting := self._module.engine.pending:
            told += f"; the engine has not answered for {', '.join(waiting[:8])}" + (", ..." if waiting[8:] else "")
        _report(f"rank {rank()}: {told}", stacks=True)
        if self._peers is not None:
            self._peers.say(Word("stalled", rank(), told, EXIT_CODES.get(phase.name, OWN_PHASE)))
        _exit(EXIT_CODES.get(phase.name, OWN_PHASE))

    # -- other ranks --------------------------------------------------------------------------------------------------

    def _hear(self, word: Word) -> None:
        """What another rank says, or no longer says; in a thread of its own."""
        if word.kind == "stalled":
            _report(f"rank {rank()}: rank {word.rank} says: {word.text}", stacks=True)
            _exit(word.code)
        if word.kind == "gone":
            _report(f"rank {rank()}: rank {word.rank} is gone: its process ended without a word (killed?){self._where}")
            self._lost.set()
            sleep(3.0)  # let the main thread say what it felt of it
        elif self._stopped.wait(1.0):  # the same has happened here
            return
        else:
            _report(f"rank {rank()}: rank {word.rank} failed: {word.text}{self._where}")
            if self._stopped.wait(GRACE_SECONDS):
                return
        _exit(LOST)

    @property
    def _where(self) -> str:
        return f"; phase {self._phases[-1].name!r} of rollout {self._module.rollout_index}" if self._phases else ""


def _report(text: str, *, stacks: bool = False) -> None:
    """Past Python's buffers and locks, which others may hold."""
    os.write(2, f"\n[watchdog] {redact(text)}\n".encode())
    if stacks:
        faulthandler.dump_traceback(2)


def _exit(code: int) -> None:
    """At once: nothing that hangs is asked to clean up."""
    sleep(0.5)  # what was said to the other ranks gets there
    os._exit(code)


def _in_debugger() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False
