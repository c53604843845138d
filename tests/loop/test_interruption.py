"""A signal ends a run where what is in memory is that of the last boundary."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from rllava_pl.distributed import signals
from rllava_pl.loop.interruption import Interruption
from rllava_pl.loop.phases import Phases
from rllava_pl.loop.state import RunState


class Counted:
    """A part with one number."""

    def __init__(self) -> None:
        self.number = 0

    def snapshot(self) -> int:
        return self.number

    def rollback(self, snapshot: int) -> None:
        self.number = snapshot


@pytest.fixture
def arrive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets a signal arrive."""

    def interrupted() -> None:
        raise signals.Interrupted(signal.SIGTERM)

    return lambda: monkeypatch.setattr(signals, "stop_if_signalled", interrupted)


@pytest.fixture
def state() -> RunState:
    """In a pass: sampled with the present weights."""
    return RunState(rollouts=3, updates=6, sampled_at=6, kl_factor=1.0)


def begun(state: RunState) -> tuple[Interruption, Counted]:
    """A rollout has begun, and since then a part and the KL factor have changed."""
    part = Counted()
    interruption = Interruption(state, [part])
    interruption.phase_begins("rollout")
    part.number, state.kl_factor = 7, 2.0
    return interruption, part


@pytest.mark.parametrize("name", ["reward", "logprobs", "update"])
def test_phase_before_the_first_update_restores_the_boundary_and_ends(name, state, arrive) -> None:
    interruption, part = begun(state)
    arrive()
    with pytest.raises(signals.Interrupted):
        interruption.phase_begins(name)
    assert part.number == 0 and state.kl_factor == 1.0


def test_micro_batch_before_the_first_update_restores_the_boundary_and_ends(state, arrive) -> None:
    interruption, part = begun(state)
    interruption.between_micro_batches()
    assert part.number == 7
    arrive()
    with pytest.raises(signals.Interrupted):
        interruption.between_micro_batches()
    assert part.number == 0 and state.kl_factor == 1.0


@pytest.mark.parametrize("name", ["update", "save"])
def test_phase_after_the_first_update_waits_for_the_end_of_the_pass(name, state, arrive) -> None:
    interruption, part = begun(state)
    state.updates += 1
    arrive()
    interruption.phase_begins(name)
    interruption.between_micro_batches()
    assert part.number == 7 and state.kl_factor == 2.0


@pytest.mark.parametrize("name", ["rollout", "validate"])
def test_rollout_and_validation_end_before_they_begin(name, state, arrive) -> None:
    interruption, part = begun(state)
    state.updates += 1
    arrive()
    with pytest.raises(signals.Interrupted):
        interruption.phase_begins(name)
    assert part.number == 7  # the pass before is complete: its boundary is now


def test_without_a_signal_nothing_changes(state) -> None:
    interruption, part = begun(state)
    for name in ("reward", "logprobs", "update"):
        interruption.phase_begins(name)
    assert part.number == 7 and state.kl_factor == 2.0


class Events:
    """An observer of phases."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def phase_begins(self, name: str) -> None:
        self.seen.append(("begins", name))

    def phase_ends(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append(("ends", name))


def test_observers_see_the_end_of_a_phase_that_fails(state) -> None:
    phases, events = Phases(Interruption(state, [])), Events()
    phases.observers.append(events)
    with pytest.raises(KeyError), phases("reward"):
        raise KeyError
    with phases("reward"):
        pass
    assert events.seen == [("begins", "reward"), ("ends", "reward")] * 2
    assert phases.seconds.keys() == {"reward"}


def test_observers_do_not_see_a_phase_that_a_signal_prevents(state, arrive) -> None:
    phases, events = Phases(Interruption(state, [])), Events()
    phases.observers.append(events)
    arrive()
    with pytest.raises(signals.Interrupted), phases("rollout"):
        raise AssertionError("the phase has begun")
    assert events.seen == []
