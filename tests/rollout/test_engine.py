"""The managed engine: synchronised before it samples, asleep after."""

from __future__ import annotations

import pytest

from rllava_pl.types import Generation, Sampling
from tests.rollout.scripted import Scripted, managed, request

SYNC = "sync ['lm_head.weight'] 3"
SAMPLE = ["start", "advance"]


def test_weights_are_pushed_before_the_first_request_and_after_updates() -> None:
    engine, now = Scripted(), [3]
    session = managed(engine, lambda: now[0])
    for version in (3, 3, 5):
        now[0] = version
        session.generate([request("a", 0)], Sampling())
    session.close()
    session.close()
    assert engine.events == [
        *["wake", SYNC, *SAMPLE, "sleep"],
        *["wake", *SAMPLE, "sleep"],
        *["wake", "sync ['lm_head.weight'] 5", *SAMPLE, "sleep"],
        "close",
    ]


def test_after_sync_runs_before_sampling_and_may_sync_again() -> None:
    engine = Scripted()
    session = managed(engine, after_sync=lambda managed: (engine.events.append("after"), managed.synchronise())[1])
    session.generate([request("a", 0)], Sampling())
    session.generate([request("a", 0)], Sampling())
    assert engine.events == ["wake", SYNC, "after", SYNC, *SAMPLE, "sleep", "wake", *SAMPLE, "sleep"]


def test_engine_sleeps_after_an_error() -> None:
    def fail(generations: list[Generation]) -> list[Generation]:
        raise OSError("the engine died")

    engine = Scripted(fail)
    with pytest.raises(OSError, match="the engine died"):
        managed(engine).generate([request("a", 0)], Sampling())
    assert engine.events[-1] == "sleep"


def test_no_requests_give_no_rollouts_but_reach_the_engine() -> None:
    engine = Scripted()
    assert managed(engine).generate([], Sampling()) == []
    assert engine.events == ["wake", SYNC, *SAMPLE, "sleep"]  # ranks in lockstep need the call
