"""Connections between ranks: which are accepted, what is forwarded, and what a broken one means."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Queue

import pytest

from rllava_pl.distributed import failure_detector
from rllava_pl.distributed.failure_detector import FailureDetector, Message


class World:
    """Three ranks in threads of one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 3) -> None:
        self.size, self.place, self.first = size, threading.local(), Queue()
        monkeypatch.setattr(failure_detector, "rank", lambda: self.place.rank)
        monkeypatch.setattr(failure_detector, "world_size", lambda: size)
        monkeypatch.setattr(failure_detector, "gather_objects", self.gather)
        self.received: list[Queue[Message]] = [Queue() for _ in range(size)]
        self.detectors: list[FailureDetector | None] = [None] * size
        self.strangers: list[Callable[[int], None]] = []

    def gather(self, own: tuple[int, str]) -> list[tuple[int, str]]:
        """What rank 0 has, on every rank."""
        if own[0]:
            for visit in self.strangers:
                visit(own[0])
            for _ in range(self.size):
                self.first.put(own)
        return [self.first.get(timeout=10)]

    def connect(self) -> list[FailureDetector]:
        """All ranks construct their detectors together."""

        def join(rank: int) -> None:
            self.place.rank = rank
            self.detectors[rank] = FailureDetector(self.received[rank].put)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return self.detectors


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drop(detector: FailureDetector) -> None:
    """What the system does to the connections of a killed process."""
    for connection in detector._connections.values():
        with suppress(OSError):  # reset already, by a message to a rank that was dropped before
            connection.shutdown(socket.SHUT_RDWR)


def test_message_reaches_all_ranks_through_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    detectors = world.connect()
    message = Message("stalled", 2, "phase 'update' takes too long", 84)
    detectors[2].send(message)
    assert [world.received[rank].get(timeout=10) for rank in (0, 1)] == [message, message]
    for detector in detectors:
        detector.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_broken_connection_is_reported_and_closed_one_is_not(monkeypatch: pytest.MonkeyPatch, victim: int) -> None:
    world = World(monkeypatch)
    detectors = world.connect()
    detectors[2].close()
    wait_until(lambda: all(2 in detector._left for detector in detectors))  # unlike a dead one, a dropped one forwards
    drop(detectors[2])
    drop(detectors[victim])
    other = 1 - victim
    assert world.received[other].get(timeout=10) == Message("gone", victim)
    detectors[other].close()


def test_connection_without_the_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    def knock(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"let-me-in 1")

    world.strangers.append(knock)
    detectors = world.connect()
    message = Message("failed", 1, "x" * 3000, 88)
    detectors[1].send(message)
    assert world.received[0].get(timeout=10) == message
    for detector in detectors:
        detector.close()


def test_rank_that_does_not_connect_is_a_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_detector, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(failure_detector, "rank", lambda: 0)
    monkeypatch.setattr(failure_detector, "world_size", lambda: 2)
    monkeypatch.setattr(failure_detector, "gather_objects", lambda own: [own])
    with pytest.raises(TimeoutError):
        FailureDetector(lambda message: None)
