"""Measured memory beside predicted, in real runs."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rllava_pl.callbacks import MemoryReport
from rllava_pl.callbacks.memory_report import ProcessMeter
from rllava_pl.callbacks.memory_report import meter as meter_of
from tests import runs

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MIB = 2**20


@linux
def test_meter_counts_touched_memory_and_a_restart_resets_it():
    meter = ProcessMeter(loaded=5 * MIB)
    with mmap.mmap(-1, 64 * MIB) as block:  # mapped by itself, so that it is freed at once
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            block[page] = 1
    assert meter.peak() == pytest.approx(69 * MIB, abs=8 * MIB)
    meter.restart()
    assert meter.peak() < 20 * MIB


@linux
@pytest.mark.parametrize("trainable", [True, False])
def test_weights_in_their_file_count_once_they_are_written(tmp_path, trainable):
    """Otherwise updated weights would count twice: as loaded, and as growth."""
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(4 * MIB)}, file)
    policy = torch.nn.Linear(1, 1)
    policy.weight = torch.nn.Parameter(load_file(file)["weight"], requires_grad=trainable)
    meter = meter_of(policy)
    assert meter.peak() == pytest.approx(0 if trainable else 16 * MIB, abs=4 * MIB)
    with torch.no_grad():
        policy.weight.add_(1.0)
    if trainable:
        assert meter.peak() == pytest.approx(16 * MIB, abs=4 * MIB)


class Steps:
    """A meter that reads from a list."""

    def __init__(self, *peaks: int) -> None:
        self.peaks = list(peaks)

    def restart(self) -> None: ...

    def peak(self) -> int:
        return self.peaks.pop(0) * 2**30


def test_peak_of_an_inner_phase_counts_for_both_phases():
    report = MemoryReport()
    report._meter = Steps(1, 7, 2)  # before, in and behind the inner one
    report.phase_begins("rollout")
    report.phase_begins("sync")
    report.phase_ends("sync", 0.0)
    report.phase_ends("rollout", 0.0)
    assert report._recent == {"sync": 7.0, "rollout": 7.0}


@linux
def test_every_rollout_logs_measured_and_predicted_memory(tmp_path, capsys):
    report = MemoryReport()
    trainer = runs.trainer(tmp_path, callbacks=[report])
    trainer.fit(runs.module(max_rollouts=2), runs.data())
    metrics = trainer.callback_metrics
    for phase in ("rollout", "update"):
        assert {f"memory/{phase}_gib", f"memory/predicted_{phase}_gib"} <= metrics.keys()
        assert metrics[f"memory/predicted_{phase}_gib"] > 0
    assert "peak memory" in capsys.readouterr().out


@linux
def test_only_the_first_of_two_reports_prints_in_each_run(tmp_path, capsys):
    module = runs.module()
    for reports in ([MemoryReport(), MemoryReport()], [MemoryReport()]):
        module.max_rollouts = module.state.rollouts + 1
        runs.trainer(tmp_path, callbacks=reports).fit(module, runs.data())
        assert [bool(report.measured) for report in reports] == [True, False][: len(reports)]
        assert capsys.readouterr().out.count("peak memory") == 1
        assert module.phases.observers == []


def test_a_run_that_cannot_be_planned_is_measured(tmp_path, monkeypatch, caplog):
    def fails(*_: object) -> None:
        raise ValueError("no memory plan for this")

    monkeypatch.setattr("rllava_pl.callbacks.memory_report.planned", fails)
    report = MemoryReport()
    trainer = runs.trainer(tmp_path, callbacks=[report])
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert report.measured and not report.predicted
    assert "no memory plan for this" in caplog.text


def test_plan_of_a_run_has_its_prompt_size_and_optimizer(tmp_path):
    report = MemoryReport()
    seen = []
    trainer = runs.trainer(tmp_path, callbacks=[report])
    original = report._plan
    report._plan = lambda *args: seen.append(args) or original(*args)  # type: ignore[method-assign]
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    from rllava_pl.callbacks.memory_report import planned

    found = planned(*seen[0])
    assert found.settings.prompt.images == 1 and found.settings.prompt.image_tokens == 4
    assert found.optimizer.moment_bytes == 8.0
    assert found.settings.batch_prompts == 4 and found.settings.minibatch_rows == 8
    assert isinstance(found.size.parameters, int) and torch.is_tensor(next(seen[0][1].policy.parameters()))
