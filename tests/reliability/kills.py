"""Kills runs at random moments, resumes them, and compares their ends with that of an uninterrupted run.

python -m tests.reliability.kills --trials 50 --workers 2
python -m tests.reliability.kills --trials 10 --ranks 2
python -m tests.reliability.kills --trials 10 --ranks 2 --sharded
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from rllava_pl.checkpoint import manifest
from tests.reliability import forks, victim
from tests.reliability.victim import BETWEEN, WRITE, Clock

SHARE = {WRITE: 5, "rollout": 5, "update": 3, "save": 2, "validate": 2, "reward": 1, "logprobs": 1, BETWEEN: 2}
"""Relative number of kills in each phase."""


@dataclass
class Outcome:
    """Counts over all trials."""

    killed: dict[str, int] = field(default_factory=dict)
    """By phase."""
    finished_before: int = 0
    resumed: int = 0
    """Resumed from a checkpoint, not from the start."""
    identical: int = 0
    lost: int = 0
    """Finished checkpoints that were missing or damaged."""
    leftovers: int = 0
    """Files of killed processes that the resumed run did not remove."""
    failures: list[str] = field(default_factory=list)


def reference(root: Path, ranks: int, every_n_rollouts: int = 1) -> tuple[object, dict[str, list[range]]]:
    """An uninterrupted run: its end, and the moments of each phase."""
    clock = Clock()

    def task(rank: int) -> None:
        with victim.marking_writes(clock):
            victim.train(root, clock, every_n_rollouts)
        torch.save({"spans": clock.spans, "calls": clock.calls}, root / f"clock-{rank}.pt")

    codes = forks.run(task, root / "log", ranks)
    assert codes == [0] * ranks, (root / "log").read_text()[-4000:]
    times = torch.load(root / "clock-0.pt", weights_only=True)
    return end_of(root), victim.moments(times["spans"], times["calls"])


def end_of(root: Path) -> tuple[object, object]:
    """Final states of all ranks, and the metrics of each pass and validation."""
    metrics = {(line["step"], min(line["metrics"])): line["metrics"] for line in victim.record(root)}
    states = [torch.load(path, weights_only=True) for path in sorted(root.glob("final-*.pt"))]
    return states, sorted(metrics.items())


def trial(root: Path, at: int, ranks: int, other_file_system: bool, outcome: Outcome, expected: object) -> None:
    """Kill at one moment, check what is on disk, resume, compare."""
    clock = Clock(at, partial(mark_and_kill, root))
    codes = forks.run(partial(attempt, root, clock, other_file_system), root / "log", ranks)
    if -9 not in codes:
        outcome.finished_before += 1
    else:
        phase = (root / "killed").read_text()
        outcome.killed[phase] = outcome.killed.get(phase, 0) + 1
    outcome.lost += lost(root)
    outcome.resumed += bool(checkpoints(root))
    codes = forks.run(partial(attempt, root, Clock(counts=False), other_file_system), root / "log", ranks)
    if codes != [0] * ranks:
        outcome.failures.append(f"call {at}: exit codes {codes}: {(root / 'log').read_text()[-2000:]}")
        return
    outcome.leftovers += len([p for p in (root / "checkpoints").iterdir() if p not in checkpoints(root)])
    if difference := victim.difference(expected, end_of(root)):
        outcome.failures.append(f"call {at}: different end: {difference}")
    else:
        outcome.identical += 1


def attempt(root: Path, clock: Clock, other_file_system: bool, rank: int) -> None:
    if other_file_system:
        tempfile.tempdir = os.environ["TMPDIR"] = "/dev/shm"
    with victim.marking_writes(clock):
        victim.train(root, clock if rank == 0 else Clock(counts=False))


def mark_and_kill(root: Path, clock: Clock) -> None:
    (root / "killed").write_text(clock.phase)
    victim.kill(clock)


def checkpoints(root: Path) -> list[Path]:
    directory = root / "checkpoints"
    return sorted(p for p in directory.glob("*") if re.fullmatch(r"rollout-\d+\.ckpt", p.name))


def lost(root: Path) -> int:
    """1 if the newest checkpoint that the run had finished is missing, plus the number of damaged ones."""
    damaged, newest = 0, -1
    for path in checkpoints(root):
        try:
            newest = max(newest, manifest.check(path).rollouts)
        except manifest.DamagedCheckpoint:
            damaged += 1
    finished = max([-1, *(int(line["committed"]) for line in victim.record(root))])
    return damaged + (newest < finished)


def campaign(trials: int, ranks: int = 1, seed: int = 0, workers: int = 1) -> dict[str, object]:
    """Run all trials in a temporary directory."""
    start = time.monotonic()
    victim.runs.tiny().prepare(1)
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        (base / "uninterrupted").mkdir()
        expected, moments = reference(base / "uninterrupted", ranks)
        phases = [phase for phase, share in SHARE.items() for _ in range(share) if phase in moments]

        def work(worker: int) -> dict[str, object]:
            outcome = Outcome()
            for k in range(worker, trials, workers):
                draw = random.Random(f"{seed}/{k}")
                at = draw.choice(draw.choice(moments[phases[k * 8 % len(phases)]]))  # 8: all phases come early
                with fresh(base / str(k)) as root:
                    trial(root, at, ranks, bool(k % 2), outcome, expected)
            return asdict(outcome)

        found = merged(forks.share_out(work, workers, base))
    return {"trials": trials, "ranks": ranks, **found, "seconds": round(time.monotonic() - start, 1)}


@contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    """A directory that is removed after the trial."""
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def merged(outcomes: list[dict[str, object]]) -> dict[str, object]:
    """Counts of all workers added up; of times, the longest."""
    total: dict[str, object] = {}
    for outcome in outcomes:
        for name, value in outcome.items():
            if name not in total:
                total[name] = value
            elif isinstance(value, dict):
                total[name] = dict(Counter(total[name]) + Counter(value))
            else:
                total[name] = max(total[name], value) if isinstance(value, float) else total[name] + value
    return total


def arguments(trials: int) -> dict[str, int]:
    """Options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sharded", action="store_true", help="shard the model over the ranks (rl_fsdp2)")
    options = vars(parser.parse_args())
    if options.pop("sharded"):
        os.environ[victim.SHARDED] = "1"  # forks inherit it
    return options


if __name__ == "__main__":
    print(json.dumps(campaign(**arguments(trials=50))))
