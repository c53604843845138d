"""Injected faults are reproducible, of the kinds that were chosen, and each is detected."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from rllava_pl.rewards.output import compute_rewards
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.testing import (
    CORRUPT,
    IN_PROCESS,
    SURVIVED,
    EngineFault,
    FaultyEngine,
    FaultyReward,
    FaultyRollout,
    Schedule,
)
from rllava_pl.types import Sampling
from tests import runs
from tests.modules.cases import prompt, rollout
from tests.rollout.scripted import Scripted, managed, request

SAMPLING = Sampling(max_tokens=8)


def test_schedule_is_a_pure_function_of_seed_and_call() -> None:
    first, again = (Schedule(["a", "b", "c"], 0.2, seed=5) for _ in range(2))
    drawn = [first.at(call) for call in range(6000)]
    assert drawn == [again.at(call) for call in range(6000)]
    assert drawn != [Schedule(["a", "b", "c"], 0.2, seed=6).at(call) for call in range(6000)]
    counts = Counter(drawn)
    assert abs(counts[""] / 6000 - 0.8) < 0.02  # 4 standard deviations
    assert all(abs(counts[kind] / 1200 - 1 / 3) < 0.07 for kind in "abc")


def test_invalid_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no 'dyes'; there are dies, times_out"):
        FaultyRollout(faults=["dyes"])
    with pytest.raises(ValueError, match="faults is empty"):
        FaultyReward([])
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        Schedule(["a"], 1.5)


MESSAGES = {
    "dies": "the engine died",
    "times_out": "did not answer",
    "too_few": "asked for 4 samples and returned 3",
    "wrong_handle": "returned a sample twice, or one that was not requested",
    "wrong_version": "sampled with weights of update 2, the policy is at update 3",
    "nan_logprobs": "a log-prob is positive or not finite",
    "positive_logprobs": "a log-prob is positive or not finite",
    "other_prompt_ids": "the engine read 5 prompt tokens, the trainer 4",
}


def unreliable(kind: str, rate: float, retries: int) -> tuple[ManagedEngine, FaultyEngine]:
    engine = FaultyEngine(Scripted(), Schedule([kind], rate))
    return managed(engine, retries=retries), engine


@pytest.mark.parametrize("kind", SURVIVED)
def test_faulty_call_is_retried_and_counted_and_stops_the_run_after_all_retries(kind: EngineFault) -> None:
    assert MESSAGES.keys() == set(SURVIVED) >= CORRUPT.keys()
    requests = [request("a", 0), request("b", 1)]
    session, engine = unreliable(kind, 0.5, retries=30)
    for _ in range(20):
        assert len(session.generate(requests, SAMPLING)) == 4
    assert session.take_faults() == engine.injected.total() > 5 and session.take_faults() == 0
    session, engine = unreliable(kind, 1.0, retries=2)
    with pytest.raises((RuntimeError, OSError), match=MESSAGES[kind]) as error:
        session.generate(requests, SAMPLING)
    assert engine.calls == 3 and session.pending == ()
    assert error.value.__notes__ == ["the engine was asked for 2 prompts at update 3"]


def test_faulty_engine_has_the_attributes_of_the_wrapped_engine() -> None:
    engine = Scripted()
    faulty = FaultyEngine(engine, Schedule(["dies"], 0.0))
    faulty.sync([], 3)
    assert faulty.version == engine.version == 3 and faulty.exact and faulty.unfinished == []


def test_error_of_the_request_is_not_retried() -> None:
    engine = Scripted(change=lambda generations: (_ for _ in ()).throw(ValueError("the prompt is too long")))
    with pytest.raises(ValueError, match="too long"):
        managed(engine, retries=5).generate([request("a", 0)], SAMPLING)
    assert engine.events.count("start") == 1


def test_pending_names_the_prompts_that_the_engine_is_sampling() -> None:
    seen: list[tuple[str, ...]] = []
    session = managed(Scripted(change=lambda generations: (seen.append(session.pending), generations)[1]))
    session.generate([request("a", 0), request("b", 1), request("a", 2)], SAMPLING)
    assert seen == [("a", "b")] and session.pending == ()


def test_faulty_reward_leaves_the_selected_samples_unscored() -> None:
    reward = FaultyReward(list(IN_PROCESS), rate=0.5, seed=1)
    rollouts = [rollout(prompt(f"p{n}"), n) for n in range(60)]
    faults = [reward.fault(r) for r in rollouts]
    assert set(faults) == {"", *IN_PROCESS}
    output = compute_rewards([reward], rollouts)
    assert list(output.rewards) == [None if fault else 0.0 for fault in faults]
    assert sum(output.causes.values()) == sum(map(bool, faults))


def test_faulty_rollout_samples_with_the_wrapped_callback(tmp_path: Path) -> None:
    faulty = FaultyRollout(faults=list(get_args(EngineFault)), rate=0.0)
    module = runs.module(max_rollouts=1)
    trainer = runs.trainer(tmp_path, callbacks=[faulty])
    trainer.fit(module, runs.data())
    assert faulty.engine.calls == 1 and not faulty.engine.injected
    assert trainer.callback_metrics["train/engine_faults"] == 0.0
    assert math.isfinite(trainer.callback_metrics["train/loss"])
