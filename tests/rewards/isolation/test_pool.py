"""Rewards in worker processes: every fault costs its sample alone, is counted, and leaves no process behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
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

from rllava_pl.rewards import AnswerTagReward, BaseReward, RewardError, RewardRunner, Scoring
from rllava_pl.rewards.isolation.fork_server import ForkServer, ForkServerLostError
from rllava_pl.rewards.isolation.spec import NotIsolableError, RewardSpec
from rllava_pl.types import IMAGE, Message, Rollout, Score, Segment
from tests.rewards import faults
from tests.rewards.faults import FAULTS, ByRank, Echo, Faulty, Grader, ImageCount, Redness, Unbuildable

MARK = f"POOL_TEST={os.getpid()}-{time.monotonic_ns()}"
"""In the environment of all processes started here: other test runs may be on this machine."""
TIMEOUT = 1.5
LIMITS = Scoring(isolation="process", timeout_seconds=TIMEOUT, memory_gib=0.25, workers=2)


def started(rewards: list[BaseReward], scoring: Scoring = LIMITS) -> RewardRunner:
    runner = RewardRunner(rewards, scoring)
    runner.start()
    return runner


def family() -> set[int]:
    """Every process of this test run that is a fork server or a copy of one, with everything that copies started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = MARK.encode() in (entry / "environ").read_bytes()
            if ours and b"import fork_server" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found


def fork_servers() -> set[int]:
    return {pid for pid in family() if int(stat(pid)[1]) == os.getpid()}


def stat(pid: int) -> list[str]:
    """State, parent and further fields of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def have_ended(processes: set[int], seconds: float = 10.0) -> bool:
    """Whether they end in time; zombies that are not reaped yet have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(is_alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    try:
        return stat(pid)[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module", autouse=True)
def marked() -> Iterator[None]:
    name, value = MARK.split("=")
    os.environ[name] = value
    yield
    del os.environ[name]


@pytest.fixture(scope="module")
def runner() -> Iterator[RewardRunner]:
    before = family()
    runner = started([Faulty(2.0, scale=(0.5,))])
    yield runner
    ours = family() - before
    runner.close()
    runner.close()
    assert ours and have_ended(ours)


def check_faults(runner: RewardRunner, rollout, times: int) -> None:
    runner([rollout("warm")])
    for name, (_, cause) in FAULTS.items():
        for _ in range(times):
            start = time.monotonic()
            output = runner([rollout("ab"), rollout(name), rollout("abcd")])
            assert time.monotonic() - start < TIMEOUT + 1, name
            assert output.rewards == [2.0, None if cause else 2.0, 4.0], name
            assert output.causes == ({cause: 1} if cause else {}), name


@pytest.mark.slow
def test_every_fault_costs_its_sample_alone(runner, rollout):
    check_faults(runner, rollout, times=1)


@pytest.mark.soak
def test_every_fault_ten_times_costs_its_sample_alone(runner, rollout):
    check_faults(runner, rollout, times=10)


def test_scores_keep_their_order_beside_faults(runner, rollout):
    texts = ["a" * (k % 7) for k in range(200)]
    texts[3], texts[50], texts[51] = "exits hard", "segfaults", "raises"
    output = runner([rollout(text) for text in texts])
    assert output.rewards == [None if text in FAULTS else float(len(text)) for text in texts]
    assert output.causes == {"crash": 2, "exception": 1}


def test_no_rollouts_give_no_scores(runner):
    assert runner([]).rewards == []


def test_restarts_count_replaced_workers_since_last_call(runner, rollout):
    runner.restarts()
    runner([rollout("exits hard")])
    assert runner.restarts() == 2  # the sample was sent to a second worker
    runner([rollout("raises")])
    assert runner.restarts() == 0


def test_latencies_cover_samples_since_last_call(runner, rollout):
    runner.latencies()
    runner([rollout("a")] * 9)
    latencies = runner.latencies()
    assert latencies.keys() == {"faulty_p50_seconds", "faulty_p99_seconds"}
    assert 0 < latencies["faulty_p50_seconds"] <= latencies["faulty_p99_seconds"] < TIMEOUT
    assert runner.latencies() == {}


def test_interrupted_call_leaves_no_answers_to_the_next(runner, rollout):
    def interrupt(*_):
        raise KeyboardInterrupt

    runner([rollout("a")])
    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT / 3)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner([rollout("a" * 8), rollout("sleeps"), rollout("a" * 9)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert runner([rollout("ab")]).rewards == [2.0]


def test_killed_fork_server_is_replaced(runner, rollout):
    runner([rollout("a")])
    servers = fork_servers()
    assert len(servers) == 1
    os.kill(*servers, signal.SIGKILL)
    assert have_ended(servers)
    assert runner([rollout("ab")] * 3).rewards == [2.0] * 3


@pytest.mark.slow
def test_fork_server_that_is_lost_twice_leaves_its_samples_unscored(rollout, monkeypatch):
    def lost(_):
        raise ForkServerLostError("killed")

    monkeypatch.setattr(ForkServer, "fork", lost)
    runner = started([Faulty()])
    output = runner([rollout("ab")] * 2)
    assert (output.rewards, output.causes, runner.restarts()) == ([None, None], {"pool": 2}, 2)
    runner.close()


def test_runner_that_is_not_started_scores_here_and_can_be_copied(rollout):
    before = family()
    runner = copy.deepcopy(RewardRunner([Faulty(2.0)], LIMITS))
    assert runner([rollout("ab"), rollout("returns None")]).rewards == [4.0, None]
    assert (runner.restarts(), runner.latencies(), family() - before) == (0, {}, set())
    runner.close()


class Loading(BaseReward):
    isolation = "none"
    loads = 0

    def load(self):
        self.loads += 1

    def score(self, rollout):
        return Score(float(self.loads))


def test_reward_in_the_trainer_is_loaded_once(rollout):
    runner = RewardRunner([Loading()], Scoring())
    assert runner([rollout()]).rewards == [1.0]
    runner.start()
    assert runner([rollout()]).rewards == [1.0]


# ----------------------------------------------------------------------------------------------- other kinds of rewards

KINDS = [Grader(), ByRank(), Redness(), ImageCount(), Echo(), AnswerTagReward()]


@pytest.fixture(scope="module")
def kinds() -> Iterator[RewardRunner]:
    """Rewards of several kinds in one pool; a start for each would cost seconds."""
    runner = started(KINDS, dataclasses.replace(LIMITS, isolation="auto", recycle_after=2))
    yield runner
    runner.close()


def scores_of(kind: type[BaseReward], kinds: RewardRunner, rollouts: list[Rollout]) -> list[Score]:
    return kinds.scores(rollouts)[[type(reward) for reward in KINDS].index(kind)]


def with_picture(rollout: Rollout) -> Rollout:
    picture = Image.new("RGB", (3, 2), (200, 10, 10))
    prompt = dataclasses.replace(rollout.prompt, messages=(Message("user", (IMAGE,)),), images=(picture,))
    return dataclasses.replace(rollout, prompt=prompt)


def test_text_that_hangs_its_grader_is_wrong_and_flagged(rollout):
    runner = started([Grader()])
    output = runner([rollout("sleeps"), rollout("segfaults"), rollout("abc"), rollout("raises")])
    runner.close()
    assert output.rewards == [0.0, 0.0, 3.0, None]
    assert output.components["accuracy"][:3] == [0.0, 0.0, 3.0]
    assert output.flags == {"grader_timeout": 1, "grader_crash": 1}
    assert output.causes == {"exception": 1}


def test_reward_with_its_own_call_scores_all_samples_at_once(kinds, rollout):
    scores = scores_of(ByRank, kinds, [rollout("a" * k) for k in (1, 3, 2)])
    assert [score.value for score in scores] == [0.0, 1.0, 0.0]
    scores = scores_of(ByRank, kinds, [rollout("short"), rollout("ab")])
    assert [score.reason for score in scores] == ["bad_length"] * 2


def test_score_that_does_not_apply_arrives_as_such(kinds, rollout):
    scores = scores_of(Grader, kinds, [rollout("does not apply"), rollout("ab")])
    assert scores == [Score.not_applicable(), Score(2.0, {"accuracy": 2.0})]


def test_images_are_sent_where_they_are_needed(kinds, rollout):
    assert scores_of(Redness, kinds, [with_picture(rollout())] * 3) == [Score(200.0)] * 3


def test_images_that_were_not_sent_cannot_be_read(kinds, rollout):
    picture = Image.new("RGB", (2, 2))
    observation = Segment(torch.tensor([5]), "observation", images=(picture,))
    episode = dataclasses.replace(rollout(), segments=(*rollout().segments, observation))
    withheld, none, observed = scores_of(ImageCount, kinds, [with_picture(rollout()), rollout(), episode])
    assert (withheld.reason, none, observed.reason) == ("exception", Score(0.0), "exception")
    assert "images are not sent to the reward's process unless its class sets needs_images = True" in withheld.detail


def test_rollout_arrives_as_it_was(kinds, rollout):
    sent = rollout("x", answer={"text": "4"}, ids=(7, 11, 13), sampled=(True, False, True))
    messages = (Message("system", ("be brief",)), Message("user", (IMAGE, "Which?", IMAGE)))
    metadata = {"note": "\ud800 \u00e9", "boxes": [[1, 2.5]]}
    prompt = dataclasses.replace(sent.prompt, metadata=metadata, messages=messages)
    first, between, last = sent.segments
    first = dataclasses.replace(first, logprobs_T=torch.tensor([-0.5]), weight_version=3)
    last = dataclasses.replace(last, logprobs_T=torch.tensor([-0.25]), weight_version=4)
    episode = dataclasses.replace(
        sent, prompt=prompt, segments=(first, between, last), finish_reason="length", step_rewards=(0.5, 1.0)
    )
    hinted = dataclasses.replace(episode, segments=(Segment(torch.tensor([7]), "given"), between, last))
    empty = dataclasses.replace(episode, segments=(Segment(torch.empty(0, dtype=torch.int64)),), step_rewards=())
    seen = {"ids": 31.0, "sampled": 2.0, "logp": -0.75, "given": 0.0, "prompt": 3.0}
    seen |= {"version": 7.0, "steps": 1.5, "slots": 2.0}
    assert scores_of(Echo, kinds, [episode, hinted, empty]) == [
        Score(1.0, seen),
        Score(1.0, seen | {"sampled": 1.0, "logp": -0.25, "given": 1.0, "version": 4.0}),
        Score(1.0, seen | {"ids": 0.0, "sampled": 0.0, "logp": 0.0, "version": -1.0, "steps": 0.0}),
    ]


def test_rewards_without_isolation_stay_in_the_trainer(kinds, rollout):
    kinds.latencies()
    kinds([rollout()])
    names = {name.removesuffix("_p50_seconds") for name in kinds.latencies() if name.endswith("_p50_seconds")}
    assert names == {"grader", "by_rank", "redness", "image_count", "echo"}


# ----------------------------------------------------------------------------------------------------- what is refused


def test_constructor_that_fails_in_another_process_ends_the_run_with_its_error(monkeypatch, rollout):
    monkeypatch.setattr(Unbuildable, "home", os.getpid())
    runner = started([Unbuildable()])
    with pytest.raises(RewardError, match=r"(?s)cannot be built in another process.*OSError: no vocabulary here"):
        runner([rollout()])
    runner.close()


class Constant(BaseReward):
    def score(self, rollout):
        return Score(1.0)


def test_reward_that_cannot_be_built_elsewhere_is_refused_with_the_reason(monkeypatch):
    class Inner(Constant):
        pass

    class NoBase:
        weight = 1.0

        def __call__(self, rollouts):
            return []

    with pytest.raises(NotIsolableError, match="Inner is defined in a script or a function; move it to a module"):
        RewardSpec.of(Inner())
    with pytest.raises(NotIsolableError, match=r"NoBase is no subclass of rllava_pl.rewards.BaseReward"):
        RewardSpec.of(NoBase())
    for argument in (object(), torch.ones(1), {1: "key"}):
        with pytest.raises(NotIsolableError, match=r"(?s)Faulty was made with .*; only numbers, strings, lists"):
            RewardSpec.of(Faulty(scale=(argument,)))
    monkeypatch.setattr(faults, "ImageCount", Faulty)
    with pytest.raises(NotIsolableError, match=r"faults.ImageCount is another class"):
        RewardSpec.of(ImageCount())


def test_such_a_reward_runs_in_the_trainer_with_a_warning_unless_processes_are_required(caplog, rollout):
    class Inner(Constant):
        pass

    assert started([Inner()], Scoring())([rollout()]).rewards == [1.0]
    assert "it runs in the trainer, where a hang or a crash ends the run" in caplog.text
    with pytest.raises(NotIsolableError):
        started([Inner()], Scoring(isolation="process"))


def test_isolation_is_not_inherited():
    class Mine(AnswerTagReward):
        pass

    assert (AnswerTagReward.isolation, Mine.isolation) == ("none", "process")


def test_reward_spec_builds_an_equal_reward():
    built = RewardSpec.of(AnswerTagReward(("think", "answer"), lenient=True, weight=0.5)).build()
    assert vars(built) == vars(AnswerTagReward(("think", "answer"), lenient=True, weight=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": 0.0}, r"scoring.timeout_seconds is 0.0; it must be above 0"),
        ({"memory_gib": math.nan}, r"scoring.memory_gib is nan; it must be above 0"),
        ({"workers": 0}, r"scoring.workers is 0"),
        ({"max_unscored": 2.0}, r"scoring.max_unscored is 2.0; it is a fraction of the samples, 0 to 1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**options)


# ----------------------------------------------------------------------------------------------------------- the ending

TRAINER = """\
import os, sys, time
from tests.rewards.conftest import make_rollout
from tests.rewards.faults import Faulty
from rllava_pl.rewards import RewardRunner, Scoring
runner = RewardRunner([Faulty()], Scoring(isolation="process"))
runner.start()
print(runner([make_rollout("leaves a child"), make_rollout("leaves a daemon")]).rewards, flush=True)
if os.fork() == 0:  # like a worker of a data loader: it keeps every connection of its parent open
    time.sleep(1000)
runner([make_rollout("sleeps")])
"""


@pytest.mark.slow
def test_no_process_outlives_a_killed_trainer(tmp_path):
    before = family()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdout.readline() == "[1.0, 1.0]\n"
    ours = family() - before
    assert len(ours) >= 4
    trainer.kill()
    trainer.wait()
    assert have_ended(ours, seconds=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)  # its copy
