"""The trainer's side of the nursery and of its workers: starting, speaking to, and ending processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from rllava_pl.rewards.base import RewardError
from rllava_pl.rewards.isolation import protocol as wire
from rllava_pl.rewards.isolation.fork_server import END, FORK, ORDER, REPLY
from rllava_pl.rewards.isolation.protocol import Json
from rllava_pl.rewards.isolation.spec import RewardSpec
from rllava_pl.types import Rollout

START_SECONDS = 120.0
"""For importing torch and building all rewards."""
REPLY_SECONDS = 10.0
"""For copying the nursery or ending a worker: milliseconds on an idle machine."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rllava_pl.rewards.isolation import fork_server; fork_server.main(int(sys.argv[1]))"
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a copied process has no threads, and workers share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # the devices are the trainer's
}


class NurseryGone(RuntimeError):
    """The nursery does not answer any more."""


@dataclass(eq=False)
class Call:
    """Samples that are scored together: one, or all if the reward compares them."""

    positions: Sequence[int]
    rollouts: Sequence[Rollout]
    seconds_left: float
    lost: int = 0
    """How often a worker ended over it by itself."""


@dataclass(eq=False)
class Worker:
    """A process that scores, one call after another."""

    pid: int
    line: socket.socket
    calls: deque[Call] = field(default_factory=deque)
    """What it was given and has not answered; it works on the first."""
    since: float = 0.0
    """When it began with that."""
    samples: int = 0
    """Scored in its life."""
    reader: wire.Reader = field(default_factory=lambda: wire.Reader(wire.MAX_ANSWER_BYTES))

    def close(self) -> None:
        """Hang up, also for copies of this process that have the line."""
        _hang_up(self.line)

    def kill_group(self) -> None:
        """End what the worker started, where the nursery cannot."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def deadline(self) -> float:
        """When its present call must be answered."""
        return self.since + self.calls[0].seconds_left


class Nursery:
    """Another process that builds rewards once and makes workers of itself; see ``rllava_pl.rewards.isolation.fork_server``."""

    def __init__(self, recipes: Sequence[RewardSpec], memory_bytes: int) -> None:
        self._line, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is the trainer's business
            )
        plan: Json = {"recipes": [cast(Json, vars(recipe)) for recipe in recipes], "memory_bytes": memory_bytes}
        self._line.sendall(wire.frame(plan))

    def wait_until_ready(self) -> None:
        """Return when all rewards are built.

        Raises:
            RewardError: They cannot be built there.
        """
        if self._ready:
            return
        self._line.settimeout(START_SECONDS)
        try:
            answer = next((message for message, _ in wire.frames(self._line)), None)
        except TimeoutError:
            answer = {"error": f"not done after {START_SECONDS:g} seconds"}
        except OSError:
            answer = None
        if answer != {"ready": True}:
            told = cast("dict[str, str]", answer)["error"] if answer else self._last_words()
            raise RewardError(
                "the rewards cannot be built in a process of their own; mend it, or let them run in the trainer "
                f'(isolation = "none" in the class, or judging.isolation: none). What happened there:\n{told}'
            )
        self._line.settimeout(REPLY_SECONDS)
        self._ready = True

    def fork(self) -> Worker:
        """A new worker.

        Raises:
            NurseryGone: There is none.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            return Worker(self._order(FORK, 0, theirs), ours)

    def end(self, worker: Worker) -> None:
        """Kill a worker and everything that it started.

        Raises:
            NurseryGone: The worker has ended with it, but what it started may be there.
        """
        worker.close()
        self._order(END, worker.pid)

    def close(self) -> None:
        """End everything."""
        _hang_up(self._line)  # what the nursery takes for the end of the trainer
        if not self._ready:
            self._process.kill()
        try:
            self._process.wait(REPLY_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _order(self, order: bytes, number: int, *lines: socket.socket) -> int:
        try:
            socket.send_fds(self._line, [ORDER.pack(order, number)], [line.fileno() for line in lines])
            reply = self._line.recv(REPLY.size, socket.MSG_WAITALL)
        except OSError as error:
            raise NurseryGone(str(error)) from error
        if len(reply) < REPLY.size:
            raise NurseryGone("it hung up")
        return int(REPLY.unpack(reply)[0])

    def _last_words(self) -> str:
        self._process.wait(REPLY_SECONDS)
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:].strip() or f"exit {self._process.returncode}"


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side may be gone
        line.shutdown(socket.SHUT_RDWR)
    line.close()
