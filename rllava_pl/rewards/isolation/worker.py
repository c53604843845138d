"""A worker process that scores rollouts, from both sides: its own loop, and what the trainer keeps of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.isolation.protocol import MAX_ANSWER_BYTES, FrameReader, read_frames, read_request, score_answer
from rllava_pl.rewards.scoring import error_score, is_samplewise, score_rollouts


def serve_scores(connection: socket.socket, rewards: Sequence[BaseReward], memory_bytes: int) -> None:
    """The loop of a worker process: answer each call with its scores until the trainer closes the connection."""
    _limit_memory(memory_bytes)
    for message, payload in read_frames(connection):
        number, rollouts = read_request(message, payload)
        reward = rewards[number]
        for samples in [[rollout] for rollout in rollouts] if is_samplewise(reward) else [rollouts]:
            try:
                scores = score_rollouts(reward, samples)
            except BaseException as error:  # also SystemExit
                scores = [error_score(error)] * len(samples)
            connection.sendall(score_answer(scores))


def _limit_memory(headroom_bytes: int) -> None:
    """Limit the address space to what the process has now, most of it shared, and ``headroom_bytes`` more."""
    import resource  # exists on Unix only, as fork does; this file is imported everywhere

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:  # Linux
        limit = int(file.read().split()[0]) * resource.getpagesize() + headroom_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


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

    def kill_group(self) -> None:
        """Kill the process and its group, where the fork server no longer can."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def close_connection(connection: socket.socket) -> None:
    """Close it for copies of this process as well, which may hold it open."""
    with contextlib.suppress(OSError):  # the other side may have ended
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
