"""Progress counts rollouts of the whole run, in a bar or in plain lines."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rllava_pl.callbacks import RolloutProgressBar
from rllava_pl.callbacks.progress import RECENT, Pace, clock, describe
from tests import runs
from tests.callbacks.conftest import Run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_pace_of_a_run_resumed_at_rollout_9() -> None:
    pace = Pace(total=20, done=9, now=0.0)
    for done, now in ((10, 4.0), (11, 6.0), (12, 8.0)):
        pace.tick(done, now)
    assert pace.fraction == "12/20"
    assert pace.seconds == pytest.approx(8 / 3)  # three rollouts in 8 s
    assert pace.eta_seconds == pytest.approx(8 * 8 / 3)  # eight to go
    assert str(pace) == "2.67 s/rollout  ETA 0:21"


def test_pace_is_of_recent_rollouts_and_eta_of_all() -> None:
    pace = Pace(total=2 * RECENT + 10, done=0, now=0.0)
    for k in range(1, RECENT + 1):  # slow: 3 s each
        pace.tick(k, 3.0 * k)
    for k in range(1, RECENT + 1):  # then fast: 1 s each
        pace.tick(RECENT + k, 3.0 * RECENT + k)
    assert pace.seconds == pytest.approx(1.0)
    assert pace.eta_seconds == pytest.approx(10 * 2.0)


def test_pace_of_an_endless_run_has_no_eta() -> None:
    endless = Pace(total=math.inf, done=0, now=0.0)
    assert str(endless) == ""
    endless.tick(1, 0.5)
    assert (endless.fraction, str(endless)) == ("1", "0.50 s/rollout")


def test_clock_shows_hours_only_if_there_are_any() -> None:
    assert [clock(s) for s in (0, 38, 725, 3600, 10817)] == ["0:00", "0:38", "12:05", "1:00:00", "3:00:17"]


def test_only_logged_metrics_are_described() -> None:
    logged = {"train/reward": torch.tensor(0.5), "train/kl": torch.tensor(0.00214), "train/loss": torch.tensor(1.0)}
    assert describe(logged) == "reward 0.500  kl 0.0021"
    assert describe({"train/reward_accuracy": torch.tensor(0.25)}) == "accuracy 0.250"
    assert describe({}) == ""


def test_output_without_a_terminal_is_plain_lines(run: Run) -> None:
    lines = [line for line in run.output.splitlines() if line.startswith("rollout ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]  # the last one once, though it is also the end
    pattern = r"rollout 2/4  reward \d\.\d{3}  accuracy \d\.\d{3}  kl [\d.e-]+  \d+\.\d\d s/rollout  ETA 0:\d\d"
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert "\x1b" not in run.output and "\r" not in run.output


def test_a_resumed_run_starts_at_its_rollout(run: Run, tmp_path: Path) -> None:
    class Probe(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            seen.append(bar.pace.fraction)

    seen: list[str] = []
    bar = RolloutProgressBar()
    trainer = runs.trainer(tmp_path, callbacks=[bar, Probe()], enable_progress_bar=True)
    trainer.fit(runs.module(), runs.data(), ckpt_path=str(run.folder / "checkpoints/rollout-000002.ckpt"))
    assert seen == ["2/4", "3/4"]


def test_a_resumed_run_continues_to_count(resumed: Run) -> None:
    lines = [line for line in resumed.output.splitlines() if line.startswith("rollout ")]
    assert [line.split()[1] for line in lines] == ["4/4"]
    pace = resumed.callbacks[RolloutProgressBar].pace
    assert (pace.done, pace.total) == (4, 4)
    assert pace.eta_seconds == 0.0


def test_a_terminal_shows_one_bar_over_all_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    bar = RolloutProgressBar(every_n_rollouts=1)
    trainer = runs.trainer(tmp_path, callbacks=[bar], enable_progress_bar=True)
    trainer.fit(runs.module(max_rollouts=3), runs.data(batch_size=4, train_size=4))  # an epoch a rollout
    frames = [ESCAPES.sub("", frame).strip() for frame in re.split(r"[\r\n]", capsys.readouterr().out)]
    last = [frame for frame in frames if frame][-1]
    assert re.match(r"3/3 ━+ \d+\.\d\d s/rollout  ETA 0:00  reward 0\.\d{3}  accuracy 0\.\d{3}  kl ", last), last
    assert max(map(len, frames)) <= 80
    assert not any(frame.startswith("rollout ") for frame in frames)


def test_a_negative_interval_is_refused() -> None:
    message = "every_n_rollouts is -1; use 0 for no plain lines or a positive number"
    with pytest.raises(ValueError, match=re.escape(message)):
        RolloutProgressBar(every_n_rollouts=-1)
