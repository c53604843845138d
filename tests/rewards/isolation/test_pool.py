"""Rewards in processes of their own: every fault costs its sample, is counted, and leaves no process behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from rllava_pl.rewards import AnswerTagReward, BaseReward, Judging, Panel, RewardError, judge
from rllava_pl.rewards.isolation.spec import NotIsolable, recipe
from rllava_pl.types import IMAGE, Message, Reward, Rollout, Score, Turn
from tests.rewards import faults
from tests.rewards.faults import FAULTS, Blind, ByRank, Echo, Faulty, Grader, Redness, Unbuildable

MARK = f"POOL_TEST={os.getpid()}-{time.monotonic_ns()}"
"""In the environment of all that is started here: other runs may be on this machine."""
TIMEOUT = 1.5
LIMITS = Judging(isolation="process", timeout_seconds=TIMEOUT, memory_gib=0.25, workers=2)


def family() -> set[int]:
    """Every process of this test run that is a nursery or a copy of one, with everything that copies have started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = MARK.encode() in (entry / "environ").read_bytes()
            if ours and b"import nursery" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found


def gone(processes: set[int], seconds: float = 10.0) -> bool:
    """Whether they end; zombies that nobody has collected yet have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module", autouse=True)
def marked() -> Iterator[None]:
    name, value = MARK.split("=")
    os.environ[name] = value
    yield
    del os.environ[name]


@pytest.fixture(scope="module")
def panel() -> Iterator[Panel]:
    before = family()
    panel = Panel([Faulty(2.0, scale=(0.5,))], LIMITS)
    yield panel
    ours = family() - before
    panel.close()
    assert ours and gone(ours)


def faults_one_by_one(panel: Panel, rollout, times: int) -> None:
    panel([rollout("warm")])
    for name, (_, cause) in FAULTS.items():
        for _ in range(times):
            start = time.monotonic()
            judgement = panel([rollout("ab"), rollout(name), rollout("abcd")])
            assert time.monotonic() - start < TIMEOUT + 1, name
            assert judgement.rewards == [2.0, None if cause else 2.0, 4.0], name
            assert judgement.causes == ({cause: 1} if cause else {}), name


@pytest.mark.slow
def test_every_fault_costs_its_sample_alone(panel, rollout):
    faults_one_by_one(panel, rollout, times=1)


@pytest.mark.soak
def test_every_fault_ten_times(panel, rollout):
    faults_one_by_one(panel, rollout, times=10)


def test_order_is_kept_whatever_happens(panel, rollout):
    texts = ["a" * (k % 7) for k in range(200)]
    texts[3], texts[50], texts[51] = "exits hard", "segfaults", "raises"
    judgement = panel([rollout(text) for text in texts])
    expected = [None if text in FAULTS else float(len(text)) for text in texts]
    assert judgement.rewards == expected
    assert judgement.causes == {"crash": 2, "exception": 1}


def test_nothing_to_score(panel):
    assert panel([]).rewards == []


def test_workers_are_replaced_and_replacements_counted(panel, rollout):
    panel.take_respawns()
    panel([rollout("exits hard")])
    assert panel.take_respawns() == 2  # the sample was tried once more
    panel([rollout("raises")])
    assert panel.take_respawns() == 0


def test_latencies_are_those_since_the_last_look(panel, rollout):
    panel.latencies()
    panel([rollout("a")] * 9)
    latencies = panel.latencies()
    assert latencies.keys() == {"faulty/p50_seconds", "faulty/p99_seconds"}
    assert 0 < latencies["faulty/p50_seconds"] <= latencies["faulty/p99_seconds"] < TIMEOUT
    assert panel.latencies() == {}


def test_an_interrupted_call_leaves_no_answers_to_the_next(panel, rollout, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rllava_pl.rewards.isolation.pool._Shift._heard_from", interrupt)
        with pytest.raises(KeyboardInterrupt):
            panel([rollout("a" * 8)])
    assert panel([rollout("ab")]).rewards == [2.0]


def test_a_killed_nursery_is_replaced(panel, rollout):
    panel([rollout("a")])
    nursery = panel.pool._nursery._process.pid
    os.kill(nursery, signal.SIGKILL)
    assert gone({nursery})
    assert panel([rollout("ab")] * 3).rewards == [2.0] * 3


# ----------------------------------------------------------------------------------------------- other kinds of rewards


@pytest.fixture(scope="module")
def kinds() -> Iterator[dict[str, Reward]]:
    """Rewards of several kinds in one pool, by name; a start of its own would cost each of them seconds."""
    rewards = [Grader(), ByRank(), Redness(), Blind(), Echo(), AnswerTagReward()]
    panel = Panel(rewards, dataclasses.replace(LIMITS, isolation="auto", recycle_after=2))
    yield {type(reward).__name__: member for reward, member in zip(rewards, panel.members, strict=True)}
    panel.close()


def with_picture(rollout: Rollout) -> Rollout:
    picture = Image.new("RGB", (3, 2), (200, 10, 10))
    return dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, images=(picture,)))


def test_a_text_that_hangs_its_grader_is_wrong_and_flagged(kinds, rollout):
    judgement = judge([kinds["Grader"]], [rollout("sleeps"), rollout("segfaults"), rollout("abc"), rollout("raises")])
    assert judgement.rewards == [0.0, 0.0, 3.0, None]
    assert judgement.components["accuracy"][:3] == [0.0, 0.0, 3.0]
    assert judgement.flags == {"grader_timeout": 1, "grader_crash": 1}
    assert judgement.causes == {"exception": 1}


def test_samples_that_are_compared_are_scored_in_one_call(kinds, rollout):
    assert judge([kinds["ByRank"]], [rollout("a" * k) for k in (1, 3, 2)]).rewards == [0.0, 1.0, 0.0]
    assert judge([kinds["ByRank"]], [rollout("short"), rollout("ab")]).causes == {"bad_length": 2}


def test_images_travel_where_they_are_wanted(kinds, rollout):
    assert judge([kinds["Redness"]], [with_picture(rollout())] * 3).rewards == [200.0] * 3


def test_images_that_did_not_travel_say_so(kinds, rollout, caplog):
    judgement = judge([kinds["Blind"]], [with_picture(rollout()), rollout()])
    assert (judgement.rewards, judgement.causes) == ([None, 0.0], {"exception": 1})
    assert "images stay in the trainer unless the reward's class says needs_images = True" in caplog.text


def test_a_rollout_arrives_as_it_was(kinds, rollout):
    sent = rollout("x", ids=(7, 11, 13), sampled=(True, False, True))
    messages = (Message("system", ("be brief",)), Message("user", (IMAGE, "Which?", IMAGE)))
    prompt = dataclasses.replace(sent.prompt, metadata={"note": "\ud800 é"}, messages=messages)
    turns, logp = (Turn(0, 1), Turn(2, 3)), torch.tensor([-0.5, 0.0, -0.25])
    sent = dataclasses.replace(sent, prompt=prompt, finish_reason="length", turns=turns, engine_logprobs=logp)
    given = dataclasses.replace(sent, demo_mask=torch.tensor([False, True, True]))
    empty = dataclasses.replace(
        rollout(ids=(), sampled=()), prompt=prompt, finish_reason="length", engine_logprobs=torch.empty(0)
    )
    seen = {"ids": 31.0, "mask": 2.0, "logp": -0.75, "demo": -1.0, "prompt": 3.0, "turns": 4.0, "slots": 2.0}
    nothing = seen | {"ids": 0.0, "mask": 0.0, "logp": 0.0, "turns": 0.0}
    assert kinds["Echo"]([sent, given, empty]) == [
        Score(1.0, seen),
        Score(1.0, seen | {"demo": 2.0}),
        Score(1.0, nothing),
    ]


def test_rewards_of_the_package_stay_in_the_trainer(kinds):
    assert type(kinds["AnswerTagReward"]) is AnswerTagReward


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_constructor_that_fails_elsewhere_ends_the_run_with_its_traceback(monkeypatch, rollout):
    monkeypatch.setattr(Unbuildable, "home", os.getpid())
    panel = Panel([Unbuildable()], LIMITS)
    with pytest.raises(
        RewardError, match=r"(?s)cannot be built in a process of their own.*OSError: no vocabulary here"
    ):
        panel([rollout()])
    panel.close()


class Local(BaseReward):
    def score(self, rollout):
        return Score(1.0)


def test_what_cannot_be_built_elsewhere_says_why(monkeypatch):
    class Inner(Local):
        pass

    class NoBase:
        weight = 1.0

        def __call__(self, rollouts):
            return []

    with pytest.raises(NotIsolable, match="Inner is written in a script or a function; move it to a file"):
        recipe(Inner())
    with pytest.raises(NotIsolable, match=r"NoBase is no subclass of rllava_pl.rewards.BaseReward"):
        recipe(NoBase())
    with pytest.raises(NotIsolable, match=r"Faulty was made with <object .*; only numbers, texts, lists"):
        recipe(Faulty(scale=(object(),)))
    monkeypatch.setattr(faults, "Blind", Faulty)
    with pytest.raises(NotIsolable, match=r"faults.Blind is another class"):
        recipe(Blind())


def test_such_a_reward_runs_in_the_trainer_with_a_warning_unless_processes_are_demanded(caplog, rollout):
    class Inner(Local):
        pass

    assert Panel([Inner()], Judging())([rollout()]).rewards == [1.0]
    assert "it runs in the trainer, which it can hang or end" in caplog.text
    with pytest.raises(NotIsolable):
        Panel([Inner()], Judging(isolation="process"))


def test_isolation_is_not_inherited():
    class Mine(AnswerTagReward):
        pass

    assert (AnswerTagReward.isolation, Mine.isolation) == ("none", "process")


def test_a_recipe_builds_an_equal_reward():
    kept = recipe(AnswerTagReward(("think", "answer"), lenient=True, weight=0.5)).build()
    assert vars(kept) == vars(AnswerTagReward(("think", "answer"), lenient=True, weight=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": 0.0}, r"judging.timeout_seconds is 0.0; it must be above 0"),
        ({"workers": 0}, r"judging.workers is 0"),
        ({"max_unscored": 2.0}, r"judging.max_unscored is 2.0; it is a part of the samples"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Judging(**options)


# ----------------------------------------------------------------------------------------------------------- the ending

TRAINER = """\
import os, sys, time
from tests.rewards.conftest import make_rollout
from tests.rewards.faults import Faulty
from rllava_pl.rewards import Judging, Panel
panel = Panel([Faulty()], Judging(isolation="process"))
print(panel([make_rollout("leaves a child"), make_rollout("leaves a daemon")]).rewards, flush=True)
if os.fork() == 0:  # like a worker of a data loader: it keeps every line of its parent open
    time.sleep(1000)
panel([make_rollout("sleeps")])
"""


@pytest.mark.slow
def test_nothing_outlives_a_killed_trainer(tmp_path):
    before = family()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdout.readline() == "[1.0, 1.0]\n"
    ours = family() - before
    assert len(ours) >= 4
    trainer.kill()
    trainer.wait()
    assert gone(ours, seconds=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)  # its own copy
