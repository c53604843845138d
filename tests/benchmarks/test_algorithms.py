"""The benchmark of the algorithms runs in real processes with few rollouts; its results are not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import CACHE

pytestmark = pytest.mark.slow  # every run is a new process

ROOT = Path(__file__).parents[2]
SHORT = ["--model.schedule.kind=constant", "--model.group_size=2", f"--model.policy.cache_dir={CACHE}"]
SMALL = ["--data.batch_size=4", "--data.val_size=8", "--data.test_size=8"]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/algorithms.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the package need not be installed for the tests
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_benchmark_trains_validates_and_tests_a_method(tmp_path):
    file = tmp_path / "algorithms.json"
    chosen = ["--methods", "dr_grpo", "--seeds", "7", "--rollouts", "4", "--every", "2", "--output", str(file)]

    done = benchmark(*chosen, *SHORT, *SMALL)

    assert done.returncode == 0, done.stderr
    (run,) = json.loads(file.read_text())["runs"]
    assert (run["method"], run["seed"], run["rollouts"]) == ("dr_grpo", 7, 4)
    assert run["updates"] == 4 * 2  # two mini-batches a rollout
    assert [(point["rollouts"], point["batches"]) for point in run["curve"]] == [(2, 2), (4, 4)]
    assert all(0 <= point["val/accuracy"] <= 1 for point in run["curve"])
    assert 0 <= run["test"]["accuracy"] <= 1
    assert run["cpu_seconds"] > 0
    assert "dr_grpo" in done.stdout.splitlines()[-1]


def test_error_of_the_training_command_ends_the_benchmark():
    done = benchmark("--methods", "dr_grpo", "--seeds", "1", "--model.group_size=1")
    assert done.returncode != 0
    assert "DrGRPO compares the completions of a prompt: group_size must be >= 2, is 1" in done.stderr


def test_unknown_method_is_refused_with_the_known_ones():
    done = benchmark("--methods", "grop")
    assert done.returncode == 2
    assert "invalid choice: 'grop'" in done.stderr and "dapo" in done.stderr
