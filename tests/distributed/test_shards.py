"""Every strategy trains, streams, resumes and evaluates as one process does; two real processes each.

Facts of one launch a strategy are shared by its tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rllava_pl.models import VLM
from rllava_pl.models.trainable import hf_weights
from tests import runs
from tests.strategies.test_ranks import ROOT, distance

Findings = dict[str, dict[str, object]]

pytestmark = pytest.mark.slow

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; `make test` does it"
)
REPLICATED = ["rl_ddp", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero1", "zero2"))]
SHARDED = ["rl_fsdp", "rl_fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero3", "zero3_offload"))]
RUNS = ("adam", "reference", "adapters", "critic")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    """By strategy, what each rank found; the ranks are started when a test needs them."""
    loaded()
    known: dict[str, list[Findings]] = {}

    def launch(strategy: str) -> list[Findings]:
        ranks, directory = 1 if strategy == "auto" else 2, tmp_path_factory.mktemp(strategy)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        worker = str(ROOT / "tests/strategies/shard_on_ranks.py")
        command = [sys.executable, *launcher, worker, str(directory), strategy, str(4 // ranks)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=280, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(directory / f"found-{rank}.pt", weights_only=True) for rank in range(ranks)]

    def of(strategy: str) -> list[Findings]:
        if strategy not in known:
            known[strategy] = launch(strategy)
        return known[strategy]

    return of


@pytest.mark.parametrize("strategy", [*REPLICATED, *SHARDED])
def test_two_ranks_train_like_one(found, strategy: str) -> None:
    """AdamW with accumulation, clipping and a schedule; a reference, a skipped update and rows without image; LoRA with
    checkpointing; a separate critic."""
    (one,) = found("auto")
    assert len(one["adam"]["losses"]) == 12
    for rank in found(strategy):
        for name in RUNS:
            apart = max(abs(a - b) for a, b in zip(rank[name]["losses"], one[name]["losses"], strict=True))
            moved = distance(rank[name]["ended"], one[name]["ended"])
            print(f"{strategy}, {name}: losses {apart:.1e}, weights {moved:.1e}")  # pytest -rP shows it
            assert rank[name]["norms"] == pytest.approx(one[name]["norms"], rel=1e-5), name
            assert apart < 1e-5 and moved < 1e-5


@pytest.mark.parametrize("strategy", [*REPLICATED, *SHARDED])
@pytest.mark.parametrize("name", ["reference", "adapters"])
def test_update_of_two_ranks_equals_that_of_one_process(found, strategy: str, name: str) -> None:
    """Shared prompts on ranks, repeated prompts in one process, under SGD; the difference relative to the update."""
    (one,) = found("auto")
    start = flat(dict(hf_weights(VLM(loaded()).load().model)))
    update, theirs = (flat(x[name]["ended"]) - start for x in (one, found(strategy)[0]))
    apart = float((theirs - update).norm() / update.norm())
    print(f"{strategy}, {name}: update {apart:.1e}")
    assert apart < 1e-5


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.double().flatten() for _, x in sorted(named.items())])


def loaded() -> str:
    """Directory of the tiny model of all runs."""
    source = runs.tiny()
    source.prepare(1)
    return source.path


@pytest.mark.parametrize("strategy", [*REPLICATED, *SHARDED])
def test_all_ranks_stream_the_same_full_weights(found, strategy: str) -> None:
    """With LoRA merged; a tensor that was yielded is not kept."""
    (one,) = found("auto")
    for rank in found(strategy):
        for name in RUNS:
            assert rank[name]["began"] == one[name]["began"], name
            assert rank[name]["most_alive"] == 0


@pytest.mark.parametrize("strategy", ["auto", *REPLICATED, *SHARDED])
def test_resumed_run_ends_bit_exact(found, strategy: str) -> None:
    for rank in found(strategy):
        assert distance(rank["resumed"]["ended"], rank["adam"]["ended"]) == 0.0
        assert rank["resumed"]["losses"] == rank["adam"]["losses"][6:]


@pytest.mark.parametrize("strategy", [*REPLICATED, *SHARDED])
def test_rank_without_prompts_runs_as_many_forwards(found, strategy: str) -> None:
    """Five rows on two ranks, half of them without image."""
    (one,) = found("auto")
    for rank in found(strategy):
        for name in ("reference", "adapters"):
            assert rank[name]["test"] == pytest.approx(one[name]["test"])


@pytest.mark.parametrize("strategy", SHARDED)
def test_rank_holds_only_its_shards(found, strategy: str) -> None:
    """Policy, reference, critic and adapters; a shard is rounded up for each tensor."""
    (one,) = found("auto")
    for rank in found(strategy):
        for name in RUNS:
            assert rank[name]["held"] < 0.52 * one[name]["held"]
