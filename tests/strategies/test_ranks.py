"""Two processes do what one does: the same update, the same metrics, every row counted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs

ROOT = Path(__file__).parents[2]


def fit(directory: Path, ranks: int, **options: object) -> list[dict[str, object]]:
    directory.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    pairs = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, *launcher, str(ROOT / "tests/strategies/fit_on_ranks.py"), str(directory), *pairs]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(ranks)]
    for rank, result in enumerate(results):
        result["weights"] = torch.load(directory / f"weights-{rank}.pt", weights_only=True)
    return results


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module", autouse=True)
def built_model() -> None:
    runs.tiny().prepare(1)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "algorithm"), [("rl_ddp", "GRPO"), ("ddp", "RLOO")])
def test_two_ranks_equal_one(tmp_path: Path, strategy: str, algorithm: str) -> None:
    (alone,) = fit(tmp_path / "one", 1, strategy="auto", batch_size=4, algorithm=algorithm)
    first, second = fit(tmp_path / "two", 2, strategy=strategy, batch_size=2, algorithm=algorithm)
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], alone["weights"]) < 1e-5
    assert not set(first["uids"]) & set(second["uids"])
    assert set(first["uids"]) | set(second["uids"]) == set(alone["uids"])
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, abs=1e-4), name
        assert second["metrics"][name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.slow
def test_a_group_dropped_on_one_rank_only_keeps_the_ranks_together(tmp_path: Path) -> None:
    (probe,) = fit(tmp_path / "probe", 1, strategy="auto", batch_size=4)
    lost = ",".join(probe["uids"][:3:2])  # both prompts of rank 0's first rollout
    (alone,) = fit(tmp_path / "one", 1, strategy="auto", batch_size=4, unscorable=lost)
    first, second = fit(tmp_path / "two", 2, strategy="rl_ddp", batch_size=2, unscorable=lost)
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], alone["weights"]) < 1e-5
