"""The line between ranks: who may be on it, what is passed on, and what silence means."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Queue

import pytest

from rllava_pl.distributed import failure_detector as peers
from rllava_pl.distributed.failure_detector import Peers, Word


class World:
    """Three ranks in threads of one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 3) -> None:
        self.size, self.place, self.first = size, threading.local(), Queue()
        monkeypatch.setattr(peers, "rank", lambda: self.place.rank)
        monkeypatch.setattr(peers, "world_size", lambda: size)
        monkeypatch.setattr(peers, "gather_objects", self.gather)
        self.heard: list[Queue[Word]] = [Queue() for _ in range(size)]
        self.ends: list[Peers | None] = [None] * size
        self.strangers: list[Callable[[int], None]] = []

    def gather(self, own: tuple[int, str]) -> list[tuple[int, str]]:
        """What rank 0 has, to everybody."""
        if own[0]:
            for visit in self.strangers:
                visit(own[0])
            for _ in range(self.size):
                self.first.put(own)
        return [self.first.get(timeout=10)]

    def meet(self) -> list[Peers]:
        """All ranks build their ends together."""

        def join(rank: int) -> None:
            self.place.rank = rank
            self.ends[rank] = Peers(self.heard[rank].put)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return self.ends


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Come back as soon as it is."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drop(end: Peers) -> None:
    """What the system does for a process that is killed."""
    for line in end._lines.values():
        with suppress(OSError):  # reset already, by a word to who was dropped before
            line.shutdown(socket.SHUT_RDWR)


def test_everybody_hears_a_word_through_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    ends = world.meet()
    word = Word("stalled", 2, "phase 'update' takes too long", 84)
    ends[2].say(word)
    assert [world.heard[rank].get(timeout=10) for rank in (0, 1)] == [word, word]
    for end in ends:
        end.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_who_ends_without_a_word_is_gone_and_who_says_goodbye_is_not(
    monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    world = World(monkeypatch)
    ends = world.meet()
    ends[2].close()
    wait_until(lambda: all(2 in end._left for end in ends))  # a dropped end, other than a dead one, still relays
    drop(ends[2])
    drop(ends[victim])
    other = 1 - victim
    assert world.heard[other].get(timeout=10) == Word("gone", victim)
    ends[other].close()


def test_a_stranger_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    def knock(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"let-me-in 1")

    world.strangers.append(knock)
    ends = world.meet()
    word = Word("failed", 1, "x" * 3000, 88)
    ends[1].say(word)
    assert world.heard[0].get(timeout=10) == word
    for end in ends:
        end.close()


def test_a_rank_that_does_not_come_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(peers, "rank", lambda: 0)
    monkeypatch.setattr(peers, "world_size", lambda: 2)
    monkeypatch.setattr(peers, "gather_objects", lambda own: [own])
    with pytest.raises(TimeoutError):
        Peers(lambda word: None)
