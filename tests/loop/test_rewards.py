"""Rewards in the loop: what a run does with samples that could not be scored."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.rewards import RewardMonitor
from rllava_pl.modules import RLModule
from rllava_pl.rewards import (
    AnswerTagReward,
    BaseReward,
    RewardError,
    RewardOutput,
    RewardRunner,
    Scoring,
    check_unscored,
)
from rllava_pl.types import Rollout, Score
from tests import runs
from tests.reliability import forks
from tests.rewards.faults import Unlucky

HERE = {"isolation": "none", "max_unscored": 1.0}
CPU = torch.device("cpu")
OUTPUT = RewardOutput(
    [1.0, None, None, 0.5],
    {"accuracy": [1.0, float("nan"), float("nan"), 0.5]},
    Counter({"timeout": 1, "No label!": 1}),
    Counter({"grader_timeout": 1}),
)


class Lazy(BaseReward):
    """Scores all samples but those of some prompts, in the order in which it meets them."""

    components = ("accuracy",)

    def __init__(self, unscored_prompts: int) -> None:
        super().__init__()
        self.left, self.refused = unscored_prompts, set()

    def score(self, rollout: Rollout) -> Score:
        uid = rollout.prompt.uid
        if uid not in self.refused and self.left:
            self.refused.add(uid)
            self.left -= 1
        if uid in self.refused:
            raise LookupError(f"no label for {uid}")
        return Score(float(rollout.text.count("e")), {"accuracy": 1.0})


# -- the monitor alone -------------------------------------------------------------------------------------------------


def monitored(output: RewardOutput, **options: object) -> tuple[RewardOutput, dict[str, float]]:
    """What the monitor makes of an output, and the metrics of the rollout."""
    scoring, metrics = Scoring(**(HERE | options)), MetricAccumulator()
    monitor, runner = RewardMonitor(scoring, metrics), RewardRunner([AnswerTagReward()], scoring)
    settled = monitor.settle(output, runner, CPU)
    found = {f"train/{name}": value for name, value in metrics.means().items()}
    monitor.report(found, runner)
    return settled, found


def test_unscored_samples_are_counted_by_cause_and_flag() -> None:
    settled, metrics = monitored(OUTPUT)
    assert settled is OUTPUT
    assert metrics == {
        "train/unscored_samples": 2.0,
        "train/unscored_fraction": 0.5,
        "train/unscored_timeout": 1.0,
        "train/unscored_no_label_": 1.0,
        "train/reward_flag_grader_timeout": 1.0,
    }


def test_nothing_is_reported_of_a_rollout_that_was_scored() -> None:
    _, metrics = monitored(RewardOutput([1.0, 0.0], {}, {}))
    assert metrics == {"train/unscored_samples": 0.0, "train/unscored_fraction": 0.0}


def test_on_error_zero_gives_unscored_samples_zero() -> None:
    settled, metrics = monitored(OUTPUT, on_error="zero")
    assert settled.rewards == [1.0, 0.0, 0.0, 0.5] and metrics["train/unscored_samples"] == 2.0


def test_on_error_stop_ends_the_run() -> None:
    with pytest.raises(RewardError, match=r"{'timeout': 1, 'No label!': 1}; scoring.on_error is stop"):
        monitored(OUTPUT, on_error="stop")
    monitored(RewardOutput([1.0], {}, {}), on_error="stop")


def test_too_many_unscored_samples_end_the_run_after_patience() -> None:
    monitor = RewardMonitor(Scoring(max_unscored=0.02, patience=2), MetricAccumulator())
    for fraction in (0.5, 0.0, 0.5):
        monitor.check({"train/unscored_fraction": fraction})
    with pytest.raises(RewardError, match=r"50.0%, 3.0% of the samples had no score in the last 2 rollouts"):
        monitor.check({"train/unscored_fraction": 0.03})


def test_limit_must_be_passed_in_every_one_of_the_last_rollouts() -> None:
    scoring = Scoring(max_unscored=0.02, patience=3)
    check_unscored([0.5, 0.5], scoring)
    check_unscored([0.5, 0.5, 0.02], scoring)
    with pytest.raises(RewardError, match=r"3.0%, 50.0%, 2.1% of the samples"):
        check_unscored([0.0, 0.03, 0.5, 0.021], scoring)


# -- in a run ----------------------------------------------------------------------------------------------------------


class Kept(Callback):
    """The metrics of every rollout."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.rows.append({name: float(x) for name, x in trainer.callback_metrics.items()})


def fit(tmp_path: Path, reward: BaseReward, **options: object) -> tuple[RLModule, list[dict[str, float]]]:
    kept = Kept()
    module = runs.module(rewards=[reward], scoring=Scoring(**(HERE | options)), max_rollouts=2)
    runs.trainer(tmp_path, callbacks=[kept]).fit(module, runs.data())
    return module, kept.rows


def test_fault_drops_its_group_and_is_counted_by_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, (first, second) = fit(tmp_path, Lazy(1))
    assert (first["train/unscored_samples"], first["train/unscored_fraction"]) == (4, 0.25)  # one prompt of 4 x 4
    assert first["train/unscored_exception"] == 4
    assert first["train/reward_accuracy"] == 1.0
    assert second["train/unscored_samples"] == 0
    assert "reward lazy, exception at prompt 'color-train:" in caplog.text
    assert "1 of 4 groups dropped, unscored samples: {'exception': 4}" in caplog.text


def test_on_error_zero_keeps_the_group_and_counts_all_the_same(tmp_path: Path) -> None:
    _, (first, _) = fit(tmp_path, Lazy(1), on_error="zero")
    assert first["train/unscored_exception"] == 4
    assert first["train/reward_accuracy"] == 0.75


def test_on_error_stop_ends_the_run_before_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"samples without a score: {'exception': 4}; scoring.on_error is stop"):
        fit(tmp_path, Lazy(1), on_error="stop")


def test_run_whose_rewards_keep_failing_stops(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"100.0%, 100.0% of the samples had no score in the last 2 rollouts"):
        fit(tmp_path, Lazy(99), max_unscored=0.02, patience=2)


@pytest.mark.slow
def test_isolated_rewards_serve_a_whole_run(tmp_path: Path) -> None:
    data = runs.data()
    data.setup("fit")
    unlucky = Unlucky([data.train_prompts[k].uid for k in range(3)])
    kept, scoring = Kept(), Scoring(isolation="process", max_unscored=1.0, workers=2)
    module = runs.module(rewards=[AnswerTagReward(), unlucky], scoring=scoring, max_rollouts=6)
    trainer = runs.trainer(tmp_path, callbacks=[kept], limit_val_batches=2)
    trainer.fit(module, data)
    # callback_metrics keep the last value of a name, so take the names of the rollouts that have them
    assert sum(row["train/unscored_samples"] for row in kept.rows) == 3 * 4  # all of 24 prompts, once each
    assert all(row["train/reward_restarts"] % 8 == 0 for row in kept.rows if row["train/unscored_samples"])
    assert {"time/reward_unlucky_p50_seconds", "time/reward_unlucky_p99_seconds"} <= kept.rows[0].keys()
    assert trainer.callback_metrics["val/unscored"] == 0
    assert module.reward_runner([]).rewards == []  # after the run, in this process


def test_unscored_answer_counts_as_wrong_in_evaluation(tmp_path: Path) -> None:
    module = runs.module(rewards=[Lazy(2)], scoring=Scoring(**HERE))
    (scores,) = runs.trainer(tmp_path, limit_val_batches=None).validate(module, runs.data(), verbose=False)
    assert scores["val/unscored"] == 0.25 and scores["val/accuracy"] == 0.75  # 8 prompts


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_ranks_count_unscored_samples_together_and_stop_together(tmp_path: Path) -> None:
    """Rank 1 has a sample without a score, rank 0 has none; both report it, and both end where on_error is stop."""
    log = tmp_path / "log"

    def task(rank: int) -> None:
        logging.basicConfig(filename=log, force=True)
        for on_error in ("drop_group", "stop"):
            scoring = Scoring(**(HERE | {"on_error": on_error}))
            module = runs.module(rewards=[Lazy(rank)], scoring=scoring, max_rollouts=1)
            trainer = runs.trainer(tmp_path, strategy="rl_ddp", devices=2)
            try:
                trainer.fit(module, runs.data(batch_size=2))
            except RewardError as error:
                logging.error("rank %d stops: %s", rank, error)
            else:
                metrics = trainer.callback_metrics
                found = metrics["train/unscored_exception"], metrics["train/unscored_fraction"]
                logging.error("rank %d, %s: %g of %g", rank, on_error, *found)

    runs.tiny().prepare(1)
    codes = forks.run(task, log, ranks=2)
    text = log.read_text()
    assert codes == [0, 0], text[-3000:]
    for rank, cause in enumerate(("on another rank", "{'exception': 4}")):
        assert f"rank {rank}, drop_group: 4 of 0.25" in text  # 4 of 2 x 8 samples
        assert f"rank {rank} stops: samples without a score: {cause}; scoring.on_error is stop" in text
