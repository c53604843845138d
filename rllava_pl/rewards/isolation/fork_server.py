"""The process that builds the rewards, from both sides, and its copies, the workers.

Starting Python and importing torch takes seconds, forking a process that has done so a few milliseconds. The fork
server only forks and reaps workers, so it stays responsive. It adopts processes that workers leave behind
(``PR_SET_CHILD_SUBREAPER``) and kills them. When the trainer ends, in whatever way, the connection breaks, and the fork
server kills all workers and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from rllava_pl.rewards.base import BaseReward, RewardError
from rllava_pl.rewards.isolation.protocol import frame, read_frames, read_request, score_answer
from rllava_pl.rewards.isolation.spec import RewardSpec
from rllava_pl.rewards.scoring import error_score, is_samplewise, score_rollouts
from rllava_pl.types import Json

START_SECONDS = 120.0
"""Longest time to import torch and to build all rewards."""
REPLY_SECONDS = 10.0
"""Longest time to fork or to kill a worker, which takes milliseconds on an idle machine."""
POLL_SECONDS = 1.0
"""Pause between checks whether the trainer still runs."""

_READY, _FORK, _KILL = b"R", b"F", b"K"
_ORDER, _REPLY = struct.Struct("!cq"), struct.Struct("!q")
"""Trainer to server: ``_FORK`` with a socket for the worker, or ``_KILL`` with its pid; the reply is the pid."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rllava_pl.rewards.isolation import fork_server; fork_server.serve(int(sys.argv[1]))"
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a forked process has no threads, and workers share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # the devices belong to the trainer
}


class ForkServerLostError(RuntimeError):
    """The fork server does not answer any more."""


class ForkServer:
    """The trainer's side; starts the process and returns at once.

    A worker may allocate ``memory_bytes`` on top of what it starts with.
    """

    def __init__(self, specs: Sequence[RewardSpec], memory_bytes: int) -> None:
        self._connection, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        setup: Json = {"specs": [vars(spec) for spec in specs], "memory_bytes": memory_bytes}
        self._connection.sendall(frame(setup))

    def wait_until_ready(self) -> None:
        """Return when all rewards are built; raises ``RewardError`` if they cannot be."""
        if self._ready:
            return
        self._connection.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):  # too late, or the connection broke
            self._ready = self._connection.recv(1) == _READY
        if not self._ready:
            self._process.kill()
            code = self._process.wait()
            self._stderr.seek(0)
            error = self._stderr.read().decode(errors="replace")[-2000:].strip()
            raise RewardError(
                "the rewards cannot be built in another process; correct this, or let them run in the trainer "
                '(isolation = "none" in the class, or scoring.isolation: none). The error there:\n'
                + (error or f"not ready within {START_SECONDS:g} seconds, exit code {code}")
            )
        self._connection.settimeout(REPLY_SECONDS)

    def fork(self) -> tuple[int, socket.socket]:
        """Pid of a new worker and the connection to it; raises ``ForkServerLostError`` if the server has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            return self._send(_FORK, 0, theirs), ours

    def kill(self, worker: int) -> None:
        """Kill a worker and every process that it has started; raises ``ForkServerLostError`` as ``fork`` does."""
        self._send(_KILL, worker)

    def close(self) -> None:
        """End the server and all workers."""
        close_connection(self._connection)
        if not self._ready:
            self._process.kill()
        try:
            self._process.wait(REPLY_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _send(self, order: bytes, pid: int, *sockets: socket.socket) -> int:
        try:
            socket.send_fds(self._connection, [_ORDER.pack(order, pid)], [s.fileno() for s in sockets])
            reply = self._connection.recv(_REPLY.size, socket.MSG_WAITALL)
        except OSError as error:
            raise ForkServerLostError(str(error)) from error
        if len(reply) < _REPLY.size:
            raise ForkServerLostError("it closed the connection")
        return int(_REPLY.unpack(reply)[0])


def close_connection(connection: socket.socket) -> None:
    """Close it for copies of this process as well, which may hold it open."""
    with contextlib.suppress(OSError):  # the other side may have ended
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


# -- in the fork server ------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Build the rewards, then fork and kill workers until the socket to the trainer is closed or the trainer ends."""
    trainer = socket.socket(fileno=descriptor)
    torch.set_num_threads(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # for a constructor that hangs
    setup = cast("dict[str, list[dict[str, str]]]", next(read_frames(trainer))[0])
    rewards = [RewardSpec(**spec).build() for spec in setup["specs"]]  # errors go to stderr, which the trainer reads
    for reward in rewards:
        reward.load()
    _prctl(_PR_SET_PDEATHSIG, 0)  # from here on the loop below notices the end, and kills the workers first
    trainer.sendall(_READY)
    gc.freeze()  # never collect what exists now, so that workers keep sharing its memory
    workers: set[int] = set()
    try:
        for order, pid, descriptors in _orders(trainer):
            if order == _FORK:
                pid = _fork(descriptors[0], trainer, rewards, cast(int, setup["memory_bytes"]))
                workers.add(pid)
                os.close(descriptors[0])
            elif pid in workers:
                _kill(pid, workers)
            trainer.sendall(_REPLY.pack(pid))
    finally:
        while workers:
            _kill(next(iter(workers)), workers)


def _orders(trainer: socket.socket) -> Iterator[tuple[bytes, int, list[int]]]:
    """Orders until the trainer closes the connection, or has ended while copies of it hold the connection open."""
    parent = os.getppid()
    with contextlib.suppress(ConnectionError):
        while True:
            while not select.select([trainer], [], [], POLL_SECONDS)[0]:
                if os.getppid() != parent:
                    return
            message, descriptors, _, _ = socket.recv_fds(trainer, _ORDER.size, 1)
            if not message:
                return
            yield *_ORDER.unpack(message), descriptors


def _fork(descriptor: int, trainer: socket.socket, rewards: list[BaseReward], memory_bytes: int) -> int:
    server = os.getpid()
    if pid := os.fork():
        return pid
    try:
        os.setsid()  # a process group, to be killed with all that the worker starts
        os.dup2(1, 2)  # /dev/null: the file that keeps the server's errors could grow without limit
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:  # else the server ended before the line above
            trainer.close()
            connection = socket.socket(fileno=descriptor)
            connection.set_inheritable(False)
            os.register_at_fork(after_in_child=connection.close)  # processes that a reward starts must not hold it
            _serve_scores(connection, rewards, memory_bytes)
    finally:
        os._exit(0)  # never return into the server's code


def _kill(worker: int, workers: set[int]) -> None:
    """Kill a worker with its group, and then every process that it had started, which now is a child of the server."""
    workers.remove(worker)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)  # if it had no group yet
    os.waitpid(worker, 0)
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # on Linux, and only there are they adopted
    while strays := set(map(int, children.read_text().split() if children.exists() else ())) - workers:
        for stray in strays:  # each may leave more behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(stray, signal.SIGKILL)
                os.waitpid(stray, 0)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# -- in a worker -------------------------------------------------------------------------------------------------------


def _serve_scores(connection: socket.socket, rewards: Sequence[BaseReward], memory_bytes: int) -> None:
    """Answer each call with its scores until the trainer closes the connection."""
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
