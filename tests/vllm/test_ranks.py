"""Two ranks with an engine each train one policy from different samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_two_ranks_learn_from_different_samples_and_stay_equal(tmp_path: Path) -> None:
    runs.tiny().prepare(1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tests/vllm/fit_on_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    weights = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not {uid for uid, _ in first["first"]} & {uid for uid, _ in second["first"]}
    assert [ids for _, ids in first["first"]] != [ids for _, ids in second["first"]]
    assert first["rewards"] == second["rewards"]  # means over both ranks
    early, late = (sum(part) / 10 for part in (first["rewards"][:10], first["rewards"][-10:]))
    assert late > early + 0.15, first["rewards"]
