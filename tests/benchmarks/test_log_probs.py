"""The benchmarks of log-probs and of packed rows run at toy sizes; times are not asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a new process each

ROOT = Path(__file__).parents[2]


def lines(script: str, *arguments: str) -> list[str]:
    """What a benchmark prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the package need not be installed for the tests
    command = [sys.executable, f"benchmarks/{script}.py", *arguments, "--turns", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_benchmark_measures_every_form_of_log_probs() -> None:
    sizes = ("--widths", "8", "16", "--rows", "16", "--vocabulary", "300", "--threads", "1")
    cases = ("full", "full, entropy", "tiles", "tiles, logp", "full frozen", "tiles frozen")
    printed = lines("logprobs", *sizes, "--cases", *cases)
    for width in (8, 16):
        start = next(k for k, line in enumerate(printed) if line.startswith(f"H = {width} "))
        assert [line[:18].strip() for line in printed[start + 2 :][: len(cases)]] == list(cases)


def test_benchmark_measures_every_layout(tmp_path: Path) -> None:
    printed = lines("shared_prompt", "--cases", "a", "--repeats", "1", "--folder", str(tmp_path / "tiny"))
    header, once, checkpointed = (line for line in printed if " / " in line)  # libraries print, too
    assert all(form in header for form in ("plain", "padded", "packed"))
    assert once.startswith("a ") and checkpointed.startswith("a checkpointed")
    assert once.count("/") == checkpointed.count("/") == 6  # three figures of three forms
