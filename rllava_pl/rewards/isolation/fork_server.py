"""The process beside the trainer that rewards are built in, and of which their workers are copies.

Starting Python and importing torch takes seconds, a copy of a process that has done so a few milliseconds: that makes
it cheap to kill a worker. The nursery does nothing but copy itself and bury its dead, so it always answers. It adopts
whatever its workers leave behind (``PR_SET_CHILD_SUBREAPER``) and ends it; and when the trainer is gone, however it
ended, the line to it breaks and the nursery ends everything, itself included.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import cast

import torch

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.isolation import protocol as wire
from rllava_pl.rewards.isolation.spec import RewardSpec
from rllava_pl.rewards.scoring import error_score as failed, is_samplewise as scores_one_by_one, score_rollouts as scored
from rllava_pl.types import Rollout, Score

ORDER = struct.Struct("!cq")
"""What the trainer says: ``FORK`` with a line for the worker, or ``END`` with the number of a worker."""
FORK, END = b"F", b"E"

REPLY = struct.Struct("!q")
"""The number of the worker that was made or ended."""

LOOK_UP_SECONDS = 1.0
"""Pause between looks whether the trainer is still there."""

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36
"""Of prctl(2): PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER."""


def main(line: int) -> None:
    """Serve the trainer at the other end of a socket until it hangs up.

    Args:
        line: File descriptor of the socket.
    """
    trainer = socket.socket(fileno=line)
    torch.set_num_threads(1)
    _prctl(_ADOPT_ORPHANS, 1)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # while a constructor may hang; from then on, whatever hangs is a worker
    plan, _ = next(wire.frames(trainer))
    try:
        body = cast("dict[str, wire.Json]", plan)
        rewards = [RewardSpec(**fields).build() for fields in cast("list[dict]", body["recipes"])]  # type: ignore[type-arg]
        for reward in rewards:
            reward.load()
    except BaseException as error:
        trainer.sendall(wire.frame({"error": failed(error).detail}))
        return
    _prctl(_DIE_WITH_PARENT, 0)
    trainer.sendall(wire.frame({"ready": True}))
    gc.freeze()  # what is there now is never collected, so that copies keep sharing its memory
    workers: set[int] = set()
    try:
        for order, number, lines in _orders(trainer):
            if order == END:
                _end(number, workers)
            else:
                number = _fork(lines[0], [trainer], lambda own: _work(own, rewards, cast(int, body["memory_bytes"])))
                workers.add(number)
                os.close(lines[0])
            trainer.sendall(REPLY.pack(number))
    finally:
        for worker in list(workers):
            _end(worker, workers)


def _orders(trainer: socket.socket) -> Iterator[tuple[bytes, int, list[int]]]:
    """What the trainer wants, until it hangs up, or is gone and only copies of it hold the line."""
    parent = os.getppid()
    with contextlib.suppress(ConnectionError):
        while True:
            while not select.select([trainer], [], [], LOOK_UP_SECONDS)[0]:
                if os.getppid() != parent:
                    return
            message, lines, _, _ = socket.recv_fds(trainer, ORDER.size, 1)
            while message and len(message) < ORDER.size:
                message += trainer.recv(ORDER.size - len(message))
            if not message:
                return
            yield *ORDER.unpack(message), lines


def _fork(line: int, not_theirs: list[socket.socket], work: Callable[[socket.socket], None]) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()  # a group of its own, to be killed with all that it starts
        os.dup2(1, 2)  # nowhere; the nursery's own errors are kept, a worker's could fill a disk
        _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:  # else it was gone before the above
            for connection in not_theirs:
                connection.close()
            own = socket.socket(fileno=line)
            own.set_inheritable(False)
            os.register_at_fork(after_in_child=own.close)  # what the worker starts must not keep its line open
            work(own)
    finally:
        os._exit(0)  # never back into the code of the nursery


def _end(worker: int, workers: set[int]) -> None:
    """Kill a worker with its group, and then everything that it had started and that lost its parent by that."""
    if worker not in workers:
        return
    workers.remove(worker)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)  # had it not yet its own group
    os.waitpid(worker, 0)
    while strays := _children() - workers:  # each may leave more behind
        for stray in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(stray, 0)


def _children() -> set[int]:
    """Processes whose parent this one is."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return {int(pid) for pid in file.read().split()}
    except OSError:  # not Linux: there, nobody is adopted
        return set()


# -- in the worker -----------------------------------------------------------------------------------------------------


def _work(line: socket.socket, rewards: list[BaseReward], memory_bytes: int) -> None:
    """Answer requests, a score at a time, until the trainer hangs up."""
    _limit_memory(memory_bytes)
    for message, rest in wire.frames(line):
        number, rollouts = wire.read_request(message, rest)
        reward = rewards[number]
        calls = [[rollout] for rollout in rollouts] if scores_one_by_one(reward) else [rollouts]
        for call in calls:
            line.sendall(wire.score_answer(_guarded(reward, call)))


def _guarded(reward: BaseReward, rollouts: list[Rollout]) -> list[Score]:
    """Checked scores, whatever is raised, ``SystemExit`` included."""
    try:
        return scored(reward, rollouts)
    except BaseException as error:
        return [failed(error)] * len(rollouts)


def _limit_memory(headroom_bytes: int) -> None:
    """Bound what this process may have on top of what it has, which is mostly torch and shared."""
    import resource  # of Unix alone, as fork is; the file is imported everywhere

    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + headroom_bytes, now + headroom_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
