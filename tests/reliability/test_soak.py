"""Many rollouts with random faults of engine, rewards and numbers: each is counted once, and memory does not grow."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import pytest
import torch
from lightning.pytorch import Callback

from rllava_pl.callbacks import Watchdog
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.rewards import AnswerTagReward, Scoring
from rllava_pl.testing import IN_PROCESS, FaultyReward, FaultyRollout, RewardFault, Schedule
from rllava_pl.types import Rollout, ScoredBatch, TrainingBatch
from tests import runs

RATE = 0.05
COUNTED = ("train/engine_faults", "train/unscored_samples", "train/skipped_nonfinite", "train/skipped_updates")


class Shaky(GRPO):
    """Some passes have an advantage that is not finite; counts what fails."""

    faults = Schedule(["nan", "inf"], RATE, seed=18)
    poisoned = faulty_samples = 0

    def compute_advantages(self, batch: ScoredBatch) -> TrainingBatch:
        training_batch = super().compute_advantages(batch)
        if (kind := self.faults.at(self.state.rollouts)) and training_batch.trained_mask_NT[0].any():
            self.poisoned += 1
            advantages_NT = training_batch.advantages_NT.clone()
            advantages_NT[0] = float(kind)
            return training_batch.replace(advantages_NT=advantages_NT)
        return training_batch

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        self.faulty_samples += sum(bool(self.rewards[1].fault(rollout)) for rollout in rollouts)
        return super().score(rollouts)


class Books(Callback):
    """Logged faults, and the memory and open files of the process after every rollout."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.rss_mib: list[float] = []
        self.files: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.totals.update({name: round(float(trainer.callback_metrics.pop(name, 0.0))) for name in COUNTED})
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss_mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))


def drift(values: Sequence[float]) -> float:
    """Relative change of the median from the tenth after a warm-up of a quarter to the last tenth."""
    tenth, start = len(values) // 10, len(values) // 4
    before, after = median(values[start : start + tenth]), median(values[-tenth:])
    return after / before - 1


@pytest.fixture(autouse=True)
def drop_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest would keep every record until the test ends."""
    monkeypatch.setattr(logging.getLogger("rllava_pl"), "propagate", False)


def soak(root: Path, rollouts: int, faults: list[RewardFault], scoring: Scoring) -> tuple[RLModule, Books]:
    engine, books = FaultyRollout(rate=RATE, seed=5), Books()
    rewards = [AnswerTagReward(), FaultyReward(faults, RATE, seed=2)]
    module = runs.module(Shaky, rewards=rewards, max_rollouts=rollouts, scoring=scoring)
    trainer = runs.trainer(root, callbacks=[engine, books, Watchdog()])
    trainer.fit(module, runs.data())
    injected, calls = engine.engine.injected, range(engine.engine.calls)
    assert injected == Counter(kind for kind in map(engine.schedule.at, calls) if kind)
    assert books.totals["train/engine_faults"] == injected.total() == len(calls) - rollouts
    assert books.totals["train/unscored_samples"] == module.faulty_samples
    assert books.totals["train/skipped_nonfinite"] == module.poisoned
    skipped = module.poisoned + books.totals["train/skipped_updates"]
    assert module.state.updates == 2 * rollouts - skipped and module.state.rollouts == rollouts
    assert all(p.isfinite().all() for p in module.parameters())
    print(f"\n{rollouts} rollouts: engine {dict(injected)}, samples {module.faulty_samples}, NaN {module.poisoned}")
    print(f"RSS {books.rss_mib[-1]:.0f} MiB, drift {drift(books.rss_mib):+.2%}; open files {books.files[-1]}")
    assert min(injected.total(), module.faulty_samples, module.poisoned) > 0
    return module, books


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.slow
def test_sixty_rollouts_with_faults(tmp_path: Path) -> None:
    _, books = soak(tmp_path, 60, list(IN_PROCESS), Scoring(isolation="none", max_unscored=1.0))
    assert abs(drift(books.rss_mib)) < 0.02
    assert books.files[-1] <= books.files[15]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_thousand_rollouts_with_faults(tmp_path: Path) -> None:
    """Including rewards that hang, exit and allocate memory, in worker processes."""
    scoring = Scoring(timeout_seconds=2.0, memory_gib=0.25, workers=2, max_unscored=1.0)
    _, books = soak(tmp_path, 2000, list(get_args(RewardFault)), scoring)
    assert abs(drift(books.rss_mib)) < 0.02
    assert books.files[-1] <= books.files[500]


def test_faults_of_the_engine_do_not_change_the_weights(tmp_path: Path) -> None:
    """Seeds belong to requests: a repeated request gets the same samples."""

    def fit(*callbacks: Callback) -> list[torch.Tensor]:
        module = runs.module(max_rollouts=8)
        runs.trainer(tmp_path, callbacks=list(callbacks)).fit(module, runs.data())
        return [p.detach().clone() for p in module.parameters()]

    faulty = FaultyRollout(rate=0.5, seed=4, retries=8)
    assert all(map(torch.equal, fit(), fit(faulty)))
    assert faulty.engine.injected.total() >= 4
