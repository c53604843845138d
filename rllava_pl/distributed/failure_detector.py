"""Detection of ranks that ended or failed, over a TCP connection from every rank to rank 0.

A collective waits for a dead rank until its own time-out, and its error names an address at best. The operating system
closes the connections of a process that ends, in whatever way; rank 0 forwards what it detects to the other ranks.
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
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple

from rllava_pl.distributed.collectives import gather_objects, rank, world_size

Kind = Literal["gone", "failed", "stalled", "bye"]
CONNECT_SECONDS = 30.0
"""For all ranks to connect."""
MAX_BYTES = 4096
"""Received at a time; at least the length of a message."""


class Message(NamedTuple):
    """What one rank sends to all others."""

    kind: Kind
    """``gone``: its connection broke; ``failed``: an exception; ``stalled``: a phase takes too long; ``bye``: it ends
    normally."""
    rank: int
    """The rank that this is about."""
    text: str = ""
    """Details for the log."""
    code: int = 0
    """Exit code."""


class FailureDetector:
    """Connects this rank to all others; all ranks construct theirs together. One machine uses the loopback interface.

    Args:
        on_message: Called, in another thread, with every message of another rank except ``bye``.
        machines: Number of machines of the run.

    Raises:
        OSError: Not all ranks could connect.
    """

    def __init__(self, on_message: Callable[[Message], None], machines: int = 1) -> None:
        self._rank = rank()
        self._on_message = on_message
        self._connections: dict[int, socket.socket] = {}
        self._incomplete: dict[int, bytes] = {}
        self._left: set[int] = set()
        self._lock = threading.Lock()
        local = machines == 1
        server = socket.create_server(("127.0.0.1" if local else "", 0)) if self._rank == 0 else None
        own = (server.getsockname()[1], secrets.token_hex(16)) if server else (0, "")
        port, token = gather_objects(own)[0]
        try:
            if server:
                self._accept_all(server, token)
            else:
                self._connect("127.0.0.1" if local else os.environ["MASTER_ADDR"], port, token)
        except OSError:
            self.close()  # the ranks that are connected must not take it for a failure
            raise
        atexit.register(self.close)  # an exit after an exception is not a broken connection
        threading.Thread(target=self._receive_all, name="failure-detector", daemon=True).start()

    def send(self, message: Message, source: int = -1) -> None:
        """Send to all connected ranks but ``source``; one that cannot be reached is reported when it is read."""
        with self._lock:
            for receiver, connection in self._connections.items():
                if receiver != source:
                    with suppress(OSError):
                        connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Announce a normal end, which the other ranks do not report. Idempotent."""
        if self._rank not in self._left:
            self._left.add(self._rank)
            self.send(Message("bye", self._rank))

    def _accept_all(self, server: socket.socket, token: str) -> None:
        with server:
            server.settimeout(CONNECT_SECONDS)
            while len(self._connections) < world_size() - 1:
                connection, _ = server.accept()
                _keep_alive(connection)
                try:
                    greeting = connection.recv(MAX_BYTES).decode(errors="replace").split()
                except OSError:
                    greeting = []
                if len(greeting) == 2 and hmac.compare_digest(greeting[0].encode(), token.encode()):
                    self._connections[int(greeting[1])] = connection
                    connection.sendall(b"\n")
                else:  # not a rank of this run
                    connection.close()

    def _connect(self, host: str, port: int, token: str) -> None:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        _keep_alive(connection)
        connection.sendall(f"{token} {self._rank}".encode())
        if not connection.recv(1):
            raise OSError("rank 0 did not accept the connection of this rank")
        self._connections[0] = connection

    def _receive_all(self) -> None:
        """Run until every connection is closed."""
        with selectors.DefaultSelector() as selector:
            for sender, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, sender)
            while selector.get_map():
                for key, _ in selector.select():
                    connection, sender = self._connections[key.data], int(key.data)
                    if not self._receive(connection, sender):
                        selector.unregister(connection)

    def _receive(self, connection: socket.socket, sender: int) -> bool:
        """Handle the bytes that have arrived; False at the end of the connection."""
        try:
            data = connection.recv(MAX_BYTES)
        except OSError:  # reset, or the machine does not answer any more
            data = b""
        *lines, self._incomplete[sender] = (self._incomplete.get(sender, b"") + data).split(b"\n")
        messages = [Message(*json.loads(line)) for line in lines]
        if not data and sender not in self._left:
            messages = [Message("gone", sender)]
        for message in messages:
            if self._rank == 0:
                self.send(message, source=sender)
            if message.kind in ("bye", "gone"):
                self._left.add(message.rank)
            if message.kind != "bye":
                self._on_message(message)
        return bool(data)


def _keep_alive(connection: socket.socket) -> None:
    """Detect a machine that lost power, which closes nothing: probe after ten silent seconds, and four times in all."""
    connection.settimeout(CONNECT_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux; other systems use their own times
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 4)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
