"""Two processes train like one: the same update, the same metrics, every row counted once."""

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


Result = dict[str, object]


def fits(directory: Path, ranks: int, algorithms: str = "GRPO", **options: object) -> dict[str, list[Result]]:
    """The result of every rank, by algorithm."""
    directory.mkdir()
    options["algorithms"] = algorithms
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    pairs = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, *launcher, str(ROOT / "tests/strategies/fit_on_ranks.py"), str(directory), *pairs]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [read(directory, name, rank) for rank in range(ranks)] for name in algorithms.split(",")}


def read(directory: Path, algorithm: str, rank: int) -> Result:
    result: Result = json.loads((directory / f"result-{algorithm}-{rank}.json").read_text())
    return result | {"weights": torch.load(directory / f"weights-{algorithm}-{rank}.pt", weights_only=True)}


def fit(directory: Path, ranks: int, **options: object) -> list[Result]:
    (results,) = fits(directory, ranks, **options).values()
    return results


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module", autouse=True)
def built_model() -> None:
    runs.tiny().prepare(1)


RL_DDP = ("GRPO", "ReinforcePP", "GPG", "ClipCov", "KLCov", "ReMax", "HPT", "UFT", "PPO", "SFT", "DPO")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "algorithms"), [("rl_ddp", RL_DDP), ("ddp", ("RLOO",))], ids=["rl_ddp", "ddp"])
def test_two_ranks_equal_one(tmp_path: Path, strategy: str, algorithms: tuple[str, ...]) -> None:
    """Means, whitening, selected tokens, denominators and critics are those of the batch of all ranks."""
    names = ",".join(algorithms)
    ones = fits(tmp_path / "one", 1, strategy="auto", batch_size=4, algorithms=names)
    twos = fits(tmp_path / "two", 2, strategy=strategy, batch_size=2, algorithms=names)
    for name in algorithms:
        (single,), (first, second) = ones[name], twos[name]
        assert distance(first["weights"], second["weights"]) == 0.0, name
        assert distance(first["weights"], single["weights"]) < 1e-5, name
        assert not set(first["uids"]) & set(second["uids"])
        assert set(first["uids"]) | set(second["uids"]) == set(single["uids"])
        for metric, value in single["metrics"].items():
            assert first["metrics"][metric] == pytest.approx(value, abs=1e-4), (name, metric)
            assert second["metrics"][metric] == pytest.approx(value, abs=1e-4), (name, metric)


@pytest.mark.slow
def test_dynamic_sampling_fills_the_batches_of_all_ranks_in_equal_rounds(tmp_path: Path) -> None:
    """No rank trains before all have a full batch, and none on more than its share."""
    first, second = fit(tmp_path / "two", 2, strategy="rl_ddp", batch_size=2, algorithms="DAPO")
    assert distance(first["weights"], second["weights"]) == 0.0
    assert first["metrics"] == second["metrics"]
    assert len(first["uids"]) == len(second["uids"]) > 3 * 2  # as many rounds on both, and more than rollouts
    assert len(first["trained"]) == len(second["trained"]) == 3
    assert max(first["trained"] + second["trained"]) == 8


@pytest.mark.slow
def test_groups_dropped_on_one_rank_leave_the_update_that_of_one_process(tmp_path: Path) -> None:
    (probe,) = fit(tmp_path / "probe", 1, strategy="auto", batch_size=4)
    lost = ",".join(probe["uids"][:3:2])  # both prompts of rank 0's first rollout
    (single,) = fit(tmp_path / "one", 1, strategy="auto", batch_size=4, unscorable=lost)
    first, second = fit(tmp_path / "two", 2, strategy="rl_ddp", batch_size=2, unscorable=lost)
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], single["weights"]) < 1e-5
