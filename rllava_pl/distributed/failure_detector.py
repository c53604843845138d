"""A line between ranks, on which the death of a process is heard at once.

A collective call waits for a dead rank until its own time-out, and its error names an address at best. The operating
system closes the connections of a process that ends, however it ends; so every rank keeps one to rank 0, which passes
on what it hears.
"""

from __future__ import annotations

import atexit
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from rllava_pl.distributed.collectives import gather_objects, rank, world_size

Kind = Literal["gone", "failed", "stalled", "bye"]
PATIENCE_SECONDS = 30.0
"""For all ranks to take up the line."""
LONGEST = 4096
"""Bytes of a word."""


class Word(NamedTuple):
    """What is said on the line."""

    kind: Kind
    """``gone``: a process ended without a word; ``failed``: with an exception; ``stalled``: a phase takes too long."""
    rank: int
    """Of whom it is said."""
    text: str = ""
    """What there is to say of it."""
    code: int = 0
    """Exit code that belongs to it."""


class Peers:
    """This rank's end of the line; all ranks build theirs together. The ranks of one machine talk over loopback.

    Args:
        heard: Called, in a thread of its own, with every word of another rank but its ``bye``.
        machines: Number of machines the ranks are on.

    Raises:
        OSError: Not all ranks could take up the line.
    """

    def __init__(self, heard: Callable[[Word], None], machines: int = 1) -> None:
        self._rank = rank()
        self._heard = heard
        self._lines: dict[int, socket.socket] = {}
        self._rest: dict[int, bytes] = {}
        self._left: set[int] = set()
        self._lock = threading.Lock()
        local = machines == 1
        server = socket.create_server(("127.0.0.1" if local else "", 0)) if self._rank == 0 else None
        own = (server.getsockname()[1], secrets.token_hex(16)) if server else (0, "")
        port, token = gather_objects(own)[0]
        try:
            if server:
                self._take_calls(server, token)
            else:
                self._call("127.0.0.1" if local else os.environ["MASTER_ADDR"], port, token)
        except OSError:
            self.close()  # who did get through must not take it for a death
            raise
        atexit.register(self.close)  # who leaves in order, by whatever exception, is not dead
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def say(self, word: Word) -> None:
        """Tell all other ranks; what cannot be delivered is nobody's concern any more."""
        self._send(word, self._lines)

    def close(self) -> None:
        """Leave; the others do not take it for a death. Idempotent."""
        if self._rank not in self._left:
            self._left.add(self._rank)
            self.say(Word("bye", self._rank))

    def _take_calls(self, server: socket.socket, token: str) -> None:
        with server:
            server.settimeout(PATIENCE_SECONDS)
            while len(self._lines) < world_size() - 1:
                line, _ = server.accept()
                _keep_alive(line)
                try:
                    greeting = line.recv(LONGEST).decode(errors="replace").split()
                except OSError:
                    greeting = []
                if len(greeting) == 2 and hmac.compare_digest(greeting[0].encode(), token.encode()):
                    self._lines[int(greeting[1])] = line
                    line.sendall(b"\n")
                else:  # a stranger
                    line.close()

    def _call(self, host: str, port: int, token: str) -> None:
        line = socket.create_connection((host, port), timeout=PATIENCE_SECONDS)
        _keep_alive(line)
        line.sendall(f"{token} {self._rank}".encode())
        if not line.recv(1):
            raise OSError("rank 0 did not accept this rank on the line between ranks")
        self._lines[0] = line

    def _listen(self) -> None:
        """Until every line has ended."""
        with selectors.DefaultSelector() as waiting:
            for peer, line in self._lines.items():
                waiting.register(line, selectors.EVENT_READ, peer)
            while waiting.get_map():
                for key, _ in waiting.select():
                    line, peer = self._lines[key.data], int(key.data)
                    if not self._receive(line, peer):
                        waiting.unregister(line)

    def _receive(self, line: socket.socket, peer: int) -> bool:
        """One portion of a line; False at its end."""
        try:
            portion = line.recv(LONGEST)
        except OSError:  # reset, or a machine that no longer answers
            portion = b""
        *texts, self._rest[peer] = (self._rest.get(peer, b"") + portion).split(b"\n")
        words = [Word(*json.loads(text)) for text in texts]
        if not portion and peer not in self._left:
            words = [Word("gone", peer)]
        for word in words:
            if self._rank == 0:
                self._send(word, set(self._lines) - {peer})
            if word.kind in ("bye", "gone"):
                self._left.add(word.rank)
            if word.kind != "bye":
                self._heard(word)
        return bool(portion)

    def _send(self, word: Word, to: Iterable[int]) -> None:
        with self._lock:
            for peer in to:
                try:
                    self._lines[peer].sendall(json.dumps(word).encode() + b"\n")
                except OSError:
                    continue  # gone: its own line will say so


def _keep_alive(line: socket.socket) -> None:
    """A machine that lost its power closes nothing: ask it after ten silent seconds, and four times in all."""
    line.settimeout(PATIENCE_SECONDS)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux; elsewhere the system's own times hold
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 4)):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
