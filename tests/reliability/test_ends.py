"""Runs that are killed or signalled at random moments of every phase resume and end like an uninterrupted run.

The trials run in another process, which may fork; ``tests/reliability/kills.py`` and ``stops.py``
have the commands for more trials.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

Outcome = dict[str, object]


def campaign(module: str, **options: int) -> Outcome:
    """What ``python -m tests.reliability.<module>`` found."""
    options_given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", f"tests.reliability.{module}", *options_given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_kills(found: Outcome) -> None:
    assert found["failures"] == []
    assert (found["identical"], found["lost"], found["leftovers"]) == (found["trials"], 0, 0)
    assert found["finished_before"] == 0
    for phase in ("write", "rollout"):
        assert found["killed"][phase] >= found["trials"] // 5, phase


def check_stops(found: Outcome) -> None:
    assert found["failures"] == []
    assert found["ended"] == found["identical"] == found["trials"]


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_weights_and_lose_no_checkpoint() -> None:
    check_kills(campaign("kills", trials=8))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sharded": True}], ids=["full", "sharded"])
def test_killed_runs_of_two_processes_resume_to_the_same_weights(options: dict[str, int]) -> None:
    check_kills(campaign("kills", trials=2, ranks=2, **options))


@pytest.mark.slow
def test_signalled_runs_save_exit_with_143_and_resume() -> None:
    check_stops(campaign("stops", trials=6))


def test_error_on_one_rank_keeps_the_previous_directory_on_all() -> None:
    found = campaign("commits")
    files = ["0.bin", "1.bin"]
    assert found["codes"] == [0, 0], found["log"]
    first = ["", [0, 2, files], "rank 1: OSError: disk full", [0, 2, files], "", [2, 2, files]]
    assert found["messages"] == [first, [*first[:2], "disk full", *first[3:]]]
    assert found["left"] == ["a.ckpt", "log", "messages-0.json", "messages-1.json"]


TWO = [{"trials": 10, "ranks": 2}, {"trials": 10, "ranks": 2, "sharded": True}]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [{"trials": 50, "workers": 2}, *TWO], ids=["one", "two", "sharded"])
def test_many_kills(options: dict[str, int]) -> None:
    check_kills(campaign("kills", **options))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [{"trials": 40, "workers": 2}, *TWO], ids=["one", "two", "sharded"])
def test_many_signals(options: dict[str, int]) -> None:
    found = campaign("stops", **options)
    check_stops(found)
    assert found["slowest_seconds"] < 10
