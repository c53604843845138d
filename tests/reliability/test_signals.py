"""Effects of a signal on a run: checkpoints, exit codes, and handlers that were installed before."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.checkpoint import manifest
from rllava_pl.modules import RLModule
from tests import runs

BEFORE = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}


class SendSignal:
    """Sends this process a signal at the beginning of a phase, the n-th time it begins."""

    def __init__(self, phase: str, number: int, time: int = 2) -> None:
        self.phase, self.number, self.left = phase, number, time

    def phase_begins(self, name: str) -> None:
        self.left -= name == self.phase
        if not self.left and name == self.phase:
            os.kill(os.getpid(), self.number)

    def phase_ends(self, name: str, seconds: float) -> None:
        pass


def fit_until(sender: SendSignal, root: Path, **options: object) -> tuple[Trainer, RLModule]:
    """Run until the signal; it must end with exit code 143 and restore the handlers of this process."""
    trainer, module = runs.trainer(root, **options), runs.module(max_rollouts=4)
    module.phases.observers.append(sender)
    with pytest.raises(SystemExit) as end:
        trainer.fit(module, runs.data())
    assert end.value.code == 143
    assert {number: signal.getsignal(number) for number in BEFORE} == BEFORE
    return trainer, module


def test_signal_in_a_rollout_discards_it_and_saves_the_state_before_it(tmp_path, caplog):
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=100)
    _, module = fit_until(SendSignal("rollout", signal.SIGTERM), tmp_path, callbacks=[callback])
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["rollout-000001.ckpt"]
    assert manifest.check(Path(callback.last_path)).updates == module.state.updates == 2
    assert "resume with --ckpt_path last" in caplog.text


def test_signal_in_an_update_completes_the_pass_first(tmp_path):
    """Two updates a rollout: a signal in the first update of the second rollout ends the run before the third."""
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=100)
    fit_until(SendSignal("update", signal.SIGUSR1, time=4), tmp_path, callbacks=[callback])
    assert manifest.check(Path(callback.last_path)).rollouts == 2


class SignalBeforeValidation(Callback):
    def on_validation_start(self, trainer: Trainer, pl_module: RLModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_between_two_phases_is_kept_when_a_validation_begins(tmp_path):
    """The checkpoint is from before the validation, which the next process runs as a whole."""
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=100)
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    never = SendSignal("never", signal.SIGTERM)
    fit_until(never, tmp_path, callbacks=[callback, SignalBeforeValidation()], **options)
    assert manifest.check(Path(callback.last_path)).rollouts == 1
    trainer, module = runs.trainer(tmp_path, **options), runs.module(max_rollouts=2)
    seen = []
    module.on_validation_epoch_end = lambda: seen.append(module.state.rollouts)
    trainer.fit(module, runs.data(), ckpt_path=callback.last_path)
    assert seen == [1, 2]


def test_signal_saves_checkpoints_of_lightning(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0)
    fit_until(SendSignal("reward", signal.SIGTERM), tmp_path, callbacks=[callback], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    assert manifest.check(path).rollouts == 1


def test_signal_in_a_test_ends_it_without_a_checkpoint(tmp_path):
    module = runs.module()
    module.phases.observers.append(SendSignal("validate", signal.SIGTERM, time=1))
    callback = RolloutCheckpoint(str(tmp_path / "checkpoints"))
    with pytest.raises(SystemExit) as end:
        runs.trainer(tmp_path, callbacks=[callback]).test(module, runs.data(), verbose=False)
    assert end.value.code == 143
    assert not (tmp_path / "checkpoints").exists()


def test_slurm_requeues_the_job_and_the_next_one_resumes(tmp_path, monkeypatch):
    """Through Lightning's own handler, called between two passes instead of between any two lines."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "train", "LOCALID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    options = {"plugins": [SLURMEnvironment(auto_requeue=True)], "devices": 1, "num_nodes": 1}
    callback = RolloutCheckpoint(str(tmp_path / "checkpoints"), every_n_rollouts=100)
    fit_until(SendSignal("logprobs", signal.SIGUSR1), tmp_path, callbacks=[callback], **options)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert manifest.check(tmp_path / "hpc_ckpt_1.ckpt").rollouts == 1
    assert manifest.check(Path(callback.last_path)).rollouts == 1
    again = runs.module(max_rollouts=4)
    runs.trainer(tmp_path, **options).fit(again, runs.data())
    uninterrupted = runs.module(max_rollouts=4)
    runs.trainer(tmp_path / "uninterrupted").fit(uninterrupted, runs.data())
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_full_disk_does_not_change_the_exit_code_of_a_signal(tmp_path, monkeypatch, caplog):
    """Nor what comes after the checkpoint callback, such as SLURM's requeue."""
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=100)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    fit_until(SendSignal("rollout", signal.SIGTERM), tmp_path, callbacks=[callback])
    assert "not saved: [Errno 28] No space left on device; there is no checkpoint" in caplog.text
