"""Checkpoints of both generations of FSDP resume on any number of ranks; real processes, a small module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.strategies.test_ranks import ROOT

pytestmark = pytest.mark.slow

STRATEGIES = ("rl_fsdp", "rl_fsdp2")
OTHER = dict(zip(STRATEGIES, reversed(STRATEGIES), strict=True))


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank and two save, each resumes its checkpoint and that of the other, and of the other strategy."""
    directory = tmp_path_factory.mktemp("resharding")
    for ranks, actions in ((1, ("save", "{s}-1")), (2, ("save", "{s}-1", "{s}-2")), (1, ("{s}-2", "{other}-2"))):
        pairs = [f"{s}:{action.format(s=s, other=OTHER[s])}" for s in STRATEGIES for action in actions]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        worker = [str(ROOT / "tests/strategies/reshard_on_ranks.py"), str(directory)]
        command = [sys.executable, *launcher, *worker, *pairs]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return directory


def difference(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> float:
    assert a["tensors"].keys() == b["tensors"].keys()
    return max(float((a["tensors"][name] - b["tensors"][name]).abs().max()) for name in a["tensors"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resume_on_any_number_of_ranks_restores_weights_moments_and_counters(
    fits: Path, strategy: str, saved_on: int, resumed_on: int
) -> None:
    """The state right after loading equals the saved one bit by bit; so does the end on the same number of ranks."""
    saved = torch.load(fits / f"{strategy}:save-on-{saved_on}.pt", weights_only=True)
    resumed = torch.load(fits / f"{strategy}:{strategy}-{saved_on}-on-{resumed_on}.pt", weights_only=True)
    assert len(saved["end"]["tensors"]) == 6 + 6 + 2 * 6 + 1  # policy, reference, two moments, the buffer
    assert difference(saved["saved"], resumed["start"]) == 0.0
    assert saved["saved"]["steps"] == resumed["start"]["steps"] == {3.0}
    assert saved["saved"]["groups"] == resumed["start"]["groups"]
    assert difference(saved["end"], resumed["end"]) <= (0.0 if saved_on == resumed_on else 1e-6)
    before, after = (saved[moment]["tensors"]["policy.head.weight"] for moment in ("start", "saved"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_either_strategy_resumes_the_checkpoint_of_the_other(fits: Path, strategy: str) -> None:
    saved = torch.load(fits / f"{OTHER[strategy]}:save-on-2.pt", weights_only=True)
    resumed = torch.load(fits / f"{strategy}:{OTHER[strategy]}-2-on-1.pt", weights_only=True)
    assert difference(saved["saved"], resumed["start"]) == 0.0
    assert saved["saved"]["groups"] == resumed["start"]["groups"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoint_holds_safetensors_of_each_rank_and_one_file_of_plain_data(fits: Path, strategy: str) -> None:
    shards = {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    found = {path.name for path in (fits / f"{strategy}-2.ckpt").iterdir()}
    assert found == shards | {"loop.ckpt", "manifest.json"}
    loop = torch.load(fits / f"{strategy}-2.ckpt" / "loop.ckpt", weights_only=True)
    (optimizer,) = loop["sharded_optimizers"]
    assert optimizer["values"] == {}
    assert [group["betas"] for group in optimizer["param_groups"]] == [(0.9, 0.999)] * 2
