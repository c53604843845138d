"""A pool of worker processes: deadlines, retries, replacements."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from rllava_pl.rewards.isolation.fork_server import ForkServer, ForkServerLostError, close_connection
from rllava_pl.rewards.isolation.protocol import (
    MAX_ANSWER_BYTES,
    FrameReader,
    ProtocolError,
    read_scores,
    score_request,
)
from rllava_pl.rewards.isolation.spec import RewardSpec
from rllava_pl.rewards.scoring import Scoring
from rllava_pl.types import Rollout, Score

MAX_CALLS = 16
"""Calls sent to a worker at a time; it answers one by one, and what it has not answered is not lost with it."""

_FAULTS = {
    "timeout": "no score within timeout_seconds of the reward, or scoring.timeout_seconds",
    "crash": "its process ended without a score, twice",
    "pool": "the processes of the pool were killed from outside, twice",
}


@dataclass(eq=False)
class Call:
    """Samples that are scored together: one, or all if the reward compares them."""

    positions: Sequence[int]
    """In the batch."""
    seconds_left: float
    crashes: int = 0
    """Worker processes that ended while they worked on it."""


@dataclass(eq=False)
class Worker:
    """A worker process as the trainer sees it."""

    pid: int
    connection: socket.socket
    calls: deque[Call] = field(default_factory=deque)
    """Sent and not yet answered; the process works on the first."""
    since: float = 0.0
    """When it began with the first call."""
    samples: int = 0
    """Scored so far."""
    reader: FrameReader = field(default_factory=lambda: FrameReader(MAX_ANSWER_BYTES))

    @property
    def deadline(self) -> float:
        """When the first call must be answered."""
        return self.since + self.calls[0].seconds_left


class RewardPool:
    """Workers that score rollouts with rewards built in another process; not to be shared by threads.

    A sample has a deadline. When it has passed, its worker and every process that the worker started are killed, and
    another worker takes over the samples that were left.
    """

    def __init__(self, specs: Sequence[RewardSpec], scoring: Scoring) -> None:
        self.restarts = 0
        """Processes replaced after a fault; the reader may reset it."""
        self._specs = specs
        self._scoring = scoring
        self._workers: list[Worker] = []
        self._server: ForkServer | None = None

    def start(self) -> ForkServer:
        """Start the fork server if there is none; returns at once, so that the trainer can load its model."""
        if self._server is None:
            self._server = ForkServer(self._specs, int(self._scoring.memory_gib * 2**30))
        return self._server

    def close(self) -> None:
        """End all processes; idempotent, and ``score`` starts them again."""
        for worker in self._workers:
            close_connection(worker.connection)
        self._workers.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def score(
        self, reward: int, rollouts: Sequence[Rollout], *, timeout_seconds: float, images: bool, together: bool
    ) -> tuple[list[Score], list[float]]:
        """Scores of all samples and the seconds they took, in order.

        Args:
            reward: Position in ``specs``.
            rollouts: Any number.
            timeout_seconds: For one sample, or for all if ``together``.
            images: Send the images of prompts and observations.
            together: Score all rollouts in one call of one worker.
        """
        groups = [range(len(rollouts))] if together and rollouts else [[n] for n in range(len(rollouts))]
        calls = [Call(group, timeout_seconds) for group in groups]
        max_calls = 1 if images else max(1, min(MAX_CALLS, len(calls) // (2 * self._scoring.workers)))
        batch = _Batch(reward, rollouts, images, calls, max_calls)
        try:
            for _ in range(2):  # a fork server that was killed is replaced once
                self.start().wait_until_ready()
                try:
                    self._run(batch)
                    break
                except ForkServerLostError:
                    for worker in self._workers:
                        batch.take_back(worker)
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(worker.pid, signal.SIGKILL)
                    self.close()
                    self.restarts += 1
        except BaseException:  # Ctrl-C: outstanding answers would be read as those of the next call
            self.close()
            raise
        return batch.scores, batch.seconds

    def _run(self, batch: _Batch) -> None:
        """Send calls and read answers until none is left."""
        while True:
            while batch.waiting and (worker := self._idle_worker()):
                if not batch.send(worker):
                    self._replace(worker, "crash", batch)
            busy = [worker for worker in self._workers if worker.calls]
            if not busy:
                return
            seconds = min(worker.deadline for worker in busy) - time.perf_counter()
            ready = wait([worker.connection for worker in busy], max(seconds, 0.0))
            for worker in busy:
                if worker.connection in ready and (fault := batch.receive(worker)):
                    self._replace(worker, fault, batch)
                if worker.calls and time.perf_counter() >= worker.deadline:
                    self._replace(worker, "timeout", batch)

    def _idle_worker(self) -> Worker | None:
        """A worker without calls, forked if need be; None if all are busy."""
        for worker in [w for w in self._workers if not w.calls and w.samples >= self._scoring.recycle_after]:
            self._kill(worker)
        idle = next((worker for worker in self._workers if not worker.calls), None)
        if idle is None and len(self._workers) < self._scoring.workers:
            idle = Worker(*self.start().fork())
            self._workers.append(idle)
        return idle

    def _replace(self, worker: Worker, fault: str, batch: _Batch) -> None:
        """Kill a worker. Its first call is to blame for a timeout or its second crash; the others are sent again."""
        if worker.calls and fault != "memory":  # which has been answered
            call = worker.calls[0]
            call.crashes += 1
            call.seconds_left = max(worker.deadline - time.perf_counter(), 0.1)
            if fault == "timeout" or call.crashes > 1:
                batch.settle(worker, [Score(None, reason=fault, detail=_FAULTS[fault])] * len(call.positions))
        batch.take_back(worker)
        self.restarts += 1
        self._kill(worker)

    def _kill(self, worker: Worker) -> None:
        close_connection(worker.connection)
        self.start().kill(worker.pid)
        self._workers.remove(worker)


class _Batch:
    """The samples of one ``RewardPool.score``: calls that wait for a worker, and the scores so far."""

    def __init__(
        self, reward: int, rollouts: Sequence[Rollout], images: bool, calls: Sequence[Call], max_calls: int
    ) -> None:
        self.reward, self.rollouts, self.images, self.max_calls = reward, rollouts, images, max_calls
        self.waiting = deque(calls)
        self.scores = [Score(None, reason="pool", detail=_FAULTS["pool"])] * len(rollouts)
        self.seconds = [0.0] * len(rollouts)

    def send(self, worker: Worker) -> bool:
        """Give the worker its next calls; False if it does not take them."""
        calls = [self.waiting.popleft() for _ in range(min(self.max_calls, len(self.waiting)))]
        worker.calls.extend(calls)
        worker.since = time.perf_counter()
        worker.reader.limit_bytes = MAX_ANSWER_BYTES * len(calls[0].positions)
        worker.connection.settimeout(calls[0].seconds_left)
        rollouts = [self.rollouts[position] for call in calls for position in call.positions]
        request = score_request(self.reward, rollouts, images=self.images)
        try:
            worker.connection.sendall(request)
            return True
        except OSError:
            return False

    def receive(self, worker: Worker) -> str:
        """Read answers of the worker; returns the fault for which it must be replaced, or ""."""
        fault = ""
        try:
            data = worker.connection.recv(1 << 16)
            for message, _ in worker.reader.feed(data):
                if not worker.calls:
                    raise ProtocolError("an answer without a call")
                scores = read_scores(message, len(worker.calls[0].positions))
                self.settle(worker, scores)
                if any(score.reason == "memory" for score in scores):
                    fault = "memory"
        except (OSError, ProtocolError):
            return "crash"
        return fault if data else "crash"

    def settle(self, worker: Worker, scores: Sequence[Score]) -> None:
        """Note the scores of the worker's first call; it continues with the next."""
        call, now = worker.calls.popleft(), time.perf_counter()
        for position, score in zip(call.positions, scores, strict=True):
            self.scores[position] = score
            self.seconds[position] = now - worker.since
        worker.since = now
        worker.samples += len(scores)

    def take_back(self, worker: Worker) -> None:
        """Calls that the worker has not answered wait for another one."""
        self.waiting.extendleft(reversed(worker.calls))
        worker.calls.clear()
