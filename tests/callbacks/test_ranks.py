"""On two ranks every file is written once and covers all rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(tmp_path: Path) -> None:
    runs.tiny().prepare(1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tests/callbacks/fit_on_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    answers = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [answer["uid"] for answer in answers] == [f"color-test:{row}" for row in range(5)]
    assert [(tmp_path / f"uids-{rank}").read_text() for rank in (0, 1)] == ["color-val:0 color-val:2"] * 2
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    right = sum(f"<answer>{answer['answer']}</answer>" == answer["text"] for answer in answers)
    assert summary["accuracy_after"] == pytest.approx(right / 5)  # every row once
    assert summary["config"]["trainer"]["ranks"] == 2
    assert done.stdout.count("GRPO is done") == 1
    assert done.stdout.count("rollout 2/2") == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"hf"}
