"""Faults on purpose: always the same ones, each of the kind that was asked for, and each noticed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from tests.rollout.test_managed import Scripted, request

from rllava_pl.rewards.output import judge
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.testing import FaultyEngine, FaultyReward, FaultyRollout, Schedule
from rllava_pl.testing.engine import SPOILT, SURVIVED, EngineFault
from rllava_pl.testing.reward import IN_PROCESS
from rllava_pl.types import Sampling
from tests import runs
from tests.modules.cases import prompt, rollout

SAMPLING = Sampling(max_tokens=8)


def test_a_schedule_is_a_pure_function_of_seed_and_call() -> None:
    first, again = (Schedule(["a", "b", "c"], 0.2, seed=5) for _ in range(2))
    drawn = [first.at(call) for call in range(6000)]
    assert drawn == [again.at(call) for call in range(6000)]
    assert drawn != [Schedule(["a", "b", "c"], 0.2, seed=6).at(call) for call in range(6000)]
    counts = Counter(drawn)
    assert abs(counts[""] / 6000 - 0.8) < 0.02  # 4 standard deviations
    assert all(abs(counts[kind] / 1200 - 1 / 3) < 0.07 for kind in "abc")


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no 'dyes'; there are dies, times_out"):
        FaultyRollout(faults=["dyes"])
    with pytest.raises(ValueError, match="faults is empty"):
        FaultyReward([])
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        Schedule(["a"], 1.5)


SAID = {
    "dies": "the engine died",
    "times_out": "did not answer",
    "too_few": "asked for 4 samples and returned 3",
    "wrong_order": "samples are out of order",
    "wrong_version": "sampled with weights of update 2, the policy is at update 3",
    "nan_logprobs": "a log-prob is positive or not finite",
    "positive_logprobs": "a log-prob is positive or not finite",
    "other_prompt_ids": "the engine read 5 prompt tokens, the trainer 4",
}


def unreliable(kind: str, rate: float, retries: int) -> tuple[ManagedEngine, FaultyEngine]:
    engine = FaultyEngine(Scripted(), Schedule([kind], rate))
    return ManagedEngine(lambda: engine, lambda: [], lambda: 3, retries=retries), engine


@pytest.mark.parametrize("kind", SURVIVED)
def test_a_fault_is_noticed_retried_and_counted_and_in_the_end_stops_the_run(kind: EngineFault) -> None:
    assert SAID.keys() == set(SURVIVED) >= SPOILT.keys()
    requests = [request("a", 0), request("b", 1)]
    managed, engine = unreliable(kind, 0.5, retries=30)
    for _ in range(20):
        assert len(managed.generate(requests, SAMPLING)) == 4
    assert managed.take_faults() == engine.injected.total() > 5 and managed.take_faults() == 0
    managed, engine = unreliable(kind, 1.0, retries=2)
    with pytest.raises((RuntimeError, OSError), match=SAID[kind]) as error:
        managed.generate(requests, SAMPLING)
    assert engine.calls == 3 and managed.pending == ()
    assert error.value.__notes__ == ["the engine was asked for 2 prompts at update 3"]


def test_what_says_that_the_request_is_wrong_is_not_retried() -> None:
    engine = Scripted(spoil=lambda rollouts: (_ for _ in ()).throw(ValueError("the prompt is too long")))
    with pytest.raises(ValueError, match="too long"):
        ManagedEngine(lambda: engine, lambda: [], lambda: 3, retries=5).generate([request("a", 0)], SAMPLING)
    assert engine.events.count("generate") == 1


def test_pending_names_the_prompts_that_the_engine_is_at_work_on() -> None:
    seen: list[tuple[str, ...]] = []
    engine = Scripted(spoil=lambda rollouts: (seen.append(managed.pending), rollouts)[1])
    managed = ManagedEngine(lambda: engine, lambda: [], lambda: 3)
    managed.generate([request("a", 0), request("b", 1), request("a", 2)], SAMPLING)
    assert seen == [("a", "b")] and managed.pending == ()


def test_a_faulty_reward_leaves_the_named_samples_without_a_score() -> None:
    reward = FaultyReward(list(IN_PROCESS), rate=0.5, seed=1)
    rollouts = [rollout(prompt(f"p{n}"), n) for n in range(60)]
    faults = [reward.fault(r) for r in rollouts]
    assert set(faults) == {"", *IN_PROCESS}
    judgement = judge([reward], rollouts)
    assert [value for value in judgement.rewards] == [None if fault else 0.0 for fault in faults]
    assert sum(judgement.causes.values()) == sum(map(bool, faults))


def test_the_wrapped_callback_does_the_work(tmp_path: Path) -> None:
    faulty = FaultyRollout(faults=list(get_args(EngineFault)), rate=0.0)
    module = runs.module(max_rollouts=1)
    trainer = runs.trainer(tmp_path, callbacks=[faulty])
    trainer.fit(module, runs.data())
    assert faulty.engine.calls == 1 and not faulty.engine.injected
    assert trainer.callback_metrics["train/engine_faults"] == 0.0
    assert math.isfinite(trainer.callback_metrics["train/loss"])
