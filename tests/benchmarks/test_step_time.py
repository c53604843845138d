"""The step-time benchmark runs in real processes with few steps; times are not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # every competitor is a new process

ROOT = Path(__file__).parents[2]


def test_benchmark_alternates_ours_and_plain_and_reports_every_step(tmp_path):
    file = tmp_path / "times.json"
    command = [sys.executable, "benchmarks/step_time.py", "--competitors", "ours", "plain", "--output", str(file)]
    command += ["--prompts", "4", "--group-size", "2", "--warmup", "1", "--turns", "2", "--steps", "1"]
    command += ["--checkpoint", str(tmp_path / "checkpoint")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the package need not be installed for the tests

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["work"]["steps"] == 3  # 1 to warm up, then 2 turns of 1
    for name in ("ours", "plain"):
        steps = [step for turn in report["results"][name]["turns"] for step in turn]
        assert len(steps) == 2
        assert all(step["cpu_ms"] > 0 and step["wall_ms"] > 0 and 0 <= step["reward"] <= 1 for step in steps)
        assert report["results"][name]["peak_rss_mib"] > 0
    assert {"time/rollout_seconds", "time/update_seconds"} <= report["results"]["ours"]["turns"][0][0].keys()
    assert report["ratios"]["plain"].keys() == {"cpu_ms", "wall_ms"}
    assert "ours / plain" in done.stdout and "phases of ours" in done.stdout
