"""Weights reach an engine in another process as bytes, through the backend that its entry point registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_engine_in_another_process_is_synchronised() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(ROOT / "tests/vllm/other_process.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("gaps")]
    assert all(float(gap) <= 1e-4 for gap in line.split()[1:])
