"""Processes that start fast: everything is imported once, and each trial is a fork."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

Task = Callable[[int], None]
"""What a process does, given its rank."""


def run(task: Task, log: Path, ranks: int = 1, limit_seconds: float = 120.0, together: bool = True) -> list[int]:
    """Fork once a rank and wait for all; returns exit codes, negative for signals.

    Args:
        task: What each rank does.
        log: Where their output goes.
        ranks: Number of processes.
        limit_seconds: All are killed after this time, so that a test fails instead of hanging; shortly before, the
            stacks of all threads go to the log.
        together: Kill all when one is killed, as a launcher does.
    """
    assert not torch.distributed.is_initialized(), "an earlier test left a process group; a fork lacks its threads"

    def watched(rank: int) -> None:
        faulthandler.dump_traceback_later(0.9 * limit_seconds)
        task(rank)

    port = free_port() if ranks > 1 else 0
    pids = [_fork(watched, rank, ranks, port, log) for rank in range(ranks)]
    return _wait(pids, time.monotonic() + limit_seconds, together)


def _fork(task: Task, rank: int, ranks: int, port: int, log: Path) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        _become(rank, ranks, port, log)
        task(rank)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _become(rank: int, ranks: int, port: int, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if ranks > 1:  # then Lightning does not launch other processes
        places = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _wait(pids: Sequence[int], deadline: float, together: bool) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        left = [pid for pid in pids if pid not in codes]
        for pid in left:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        killed = together and any(code == -9 for code in codes.values())
        for pid in pids:
            if pid not in codes and (killed or time.monotonic() > deadline):
                os.kill(pid, 9)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def share_out(work: Callable[[int], dict[str, object]], workers: int, directory: Path) -> list[dict[str, object]]:
    """Run ``work(0)`` to ``work(workers - 1)`` in parallel forks; returns their results, sent as JSON."""

    def task(worker: int, _: int) -> None:
        (directory / f"worker-{worker}.json").write_text(json.dumps(work(worker)))

    pids = [_fork(partial(task, worker), 0, 1, 0, directory / "log") for worker in range(workers)]
    codes = _wait(pids, float("inf"), together=False)
    assert codes == [0] * workers, (directory / "log").read_text()[-4000:]
    return [json.loads((directory / f"worker-{worker}.json").read_text()) for worker in range(workers)]
