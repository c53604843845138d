"""A run that hangs exits with the code of its phase; other ranks name a dead rank."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from rllava_pl.callbacks import RolloutCheckpoint, Watchdog, watchdog
from rllava_pl.callbacks.watchdog import EXIT_CODES, LOST
from rllava_pl.loop.options import KL
from rllava_pl.testing import FaultyRollout
from tests import runs
from tests.reliability import forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def hang(*args: object, **kwargs: object) -> None:
    threading.Event().wait()


LIMIT_SECONDS = 2.0


def fit(root: Path, callbacks: list[Callback], deadlines: dict[str, float] | None = None, **options: object) -> None:
    """A short run in which something hangs or ends."""
    module = runs.module(max_rollouts=4, kl=KL(loss_coef=0.01))
    runs.trainer(root, callbacks=[*callbacks, Watchdog(deadlines=deadlines)], **options).fit(module, runs.data())


class InThirdRollout(Callback):
    """Replaces a method of the module or of one of its parts, and sets the limit of a phase."""

    def __init__(self, name: str, replacement: Callable[..., object], phase: str = "") -> None:
        self.name, self.replacement, self.phase = name, replacement, phase

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 2:
            *parts, name = self.name.split(".")
            setattr(reduce(getattr, parts, pl_module), name, self.replacement)
            if self.phase:
                (watchdog,) = (callback for callback in trainer.callbacks if isinstance(callback, Watchdog))
                watchdog.deadlines[self.phase] = LIMIT_SECONDS


class Hangs(Callback):
    on_train_batch_start = hang


class Saves(RolloutCheckpoint):
    def _save(self, trainer, rollouts) -> None:
        trainer.save_checkpoint = hang
        super()._save(trainer, rollouts)


class Syncs(FaultyRollout):
    def build(self, module):
        engine = super().build(module)
        engine.sync = hang
        return engine


HANGS: dict[str, Callable[[], Callback]] = {
    "rollout": lambda: FaultyRollout(faults=["hangs"], rate=1.0),
    "reward": lambda: InThirdRollout("reward_monitor.settle", hang, "reward"),
    "logprobs": lambda: InThirdRollout("reference.forward", hang, "logprobs"),
    "update": lambda: InThirdRollout("losses", hang, "update"),
    "sync": lambda: Syncs(rate=0.0),
    "save": lambda: Saves(every_n_rollouts=2),
    "validate": lambda: InThirdRollout("evaluator.step", hang, "validate"),
    "between": Hangs,
}
"""By phase; what hangs is replaced in the third rollout, or hangs from the start."""


@pytest.fixture(scope="module", autouse=True)
def model_is_there() -> None:
    runs.tiny().prepare(1)


@pytest.mark.slow
def test_a_hanging_phase_is_named_and_has_its_exit_code(tmp_path: Path) -> None:
    assert HANGS.keys() == EXIT_CODES.keys()
    for phase in HANGS:
        log = tmp_path / f"{phase}.log"
        options = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
        options = options if phase == "validate" else {}

        def task(rank: int, phase=phase, options=options) -> None:
            hanging = HANGS[phase]()
            first = {} if isinstance(hanging, InThirdRollout) else {phase: LIMIT_SECONDS}
            fit(tmp_path, [hanging], first, **options)

        (code,) = forks.run(task, log)
        said = log.read_text()
        assert code == EXIT_CODES[phase], (phase, code, said[-3000:])
        assert f"[watchdog] rank 0: phase '{phase}' of rollout " in said
        assert re.search(r'(test_watchdog|rllava_pl/testing)\.py", line \d+ in (hang|advance)', said), (phase, said)
        waited_for = "the engine has not answered for color-train:"
        assert (waited_for in said) == (phase in ("rollout", "sync")), phase


@pytest.mark.slow
def test_after_a_timeout_other_ranks_exit_with_the_same_code(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        fit(tmp_path, [HANGS["reward"]()] if rank else [], strategy="rl_ddp", devices=2)

    codes = forks.run(task, log := tmp_path / "log", ranks=2)
    said = log.read_text()
    assert codes == [EXIT_CODES["reward"]] * 2, said[-3000:]
    assert "rank 1: phase 'reward' of rollout 2 has taken" in said
    assert "rank 0: rank 1 says: phase 'reward' of rollout 2" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other_rank(tmp_path: Path, victim: int) -> None:
    def task(rank: int) -> None:
        def die(*_: object) -> None:
            (tmp_path / "death").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

        fit(tmp_path, [InThirdRollout("losses", die)] if rank == victim else [], strategy="rl_ddp", devices=2)

    codes = forks.run(task, log := tmp_path / "log", ranks=2, together=False)
    survived_seconds = time.time() - float((tmp_path / "death").read_text())
    print(f"the other rank ended {survived_seconds:.1f} s later")
    assert survived_seconds < 30
    said = log.read_text()
    assert codes[victim] == -9 and codes[1 - victim] == LOST, said[-3000:]
    assert f"rank {1 - victim}: rank {victim} is gone: its process was killed or crashed" in said


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 1.0)

    def fail(*_: object) -> None:
        raise KeyError("the key that was missing")

    def task(rank: int) -> None:
        fit(tmp_path, [InThirdRollout("compute_advantages", fail if rank else hang)], strategy="rl_ddp", devices=2)

    codes = forks.run(task, log := tmp_path / "log", ranks=2, limit_seconds=60.0)
    said = log.read_text()
    assert codes[1] == 1 and codes[0] == LOST, said[-3000:]
    assert "rank 0: rank 1 failed: KeyError: 'the key that was missing'" in said


def test_a_run_without_timeouts_is_not_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, watchdog = runs.module(max_rollouts=2), Watchdog()
    runs.trainer(tmp_path, callbacks=[watchdog]).fit(module, runs.data())
    assert module.state.rollouts == 2 and "[watchdog]" not in capfd.readouterr().err
    assert module.phases.observers == []
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(timeout=60.0)
            assert not thread.is_alive()


def test_limits_are_multiples_of_the_median() -> None:
    watchdog = Watchdog(factor=10.0, floor_seconds=60.0, first_seconds=3600.0, deadlines={"save": 5.0})
    assert (watchdog.limit("rollout"), watchdog.limit("save")) == (3600.0, 5.0)
    for seconds in (1.0, 30.0, 20.0):
        watchdog.phase_ends("rollout", seconds)
    assert watchdog.limit("rollout") == 200.0
    for _ in range(20):
        watchdog.phase_ends("rollout", 1.0)
    assert watchdog.limit("rollout") == 60.0


def test_unknown_phases_and_zero_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no phase 'rolout'; the phases are between, rollout, reward"):
        Watchdog(deadlines={"rolout": 5.0})
    with pytest.raises(ValueError, match=r"floor_seconds \(0\)"):
        Watchdog(floor_seconds=0)
