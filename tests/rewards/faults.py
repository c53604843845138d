"""Rewards that misbehave on command: the response says how. Importable, so that they can be built in a worker."""

from __future__ import annotations

import ctypes
import os
import sys
import time

from rllava_pl.rewards import BaseReward
from rllava_pl.types import Rollout, Score


def _hang() -> Score:
    while True:
        time.sleep(100)


def _spin() -> Score:
    while True:
        pass


def _flood() -> Score:
    for _ in range(20_000):
        print("x" * 1000)
    os.write(2, b"y" * 1_000_000)
    return Score(1.0)


def _leave_child(*, own_session: bool) -> Score:
    """A child that outlives the worker, as a daemon if asked."""
    if os.fork() == 0:
        if own_session:
            os.setsid()
            if os.fork():
                os._exit(0)
        time.sleep(1000)
        os._exit(0)
    return Score(1.0)


def _come_back_twice() -> Score:
    os.fork()
    return Score(1.0)


def _close_everything() -> Score:
    os.closerange(0, 100)
    return Score(1.0)


def _babble() -> Score:
    """Bytes that are no frame, to whatever is open."""
    for line in range(3, 100):
        try:
            os.write(line, b"\xff" * 64)
        except OSError:
            continue
    return Score(1.0)


FAULTS = {
    "raises": (lambda: Score(1 / 0), "exception"),
    "recurses": (lambda: FAULTS["recurses"][0](), "exception"),
    "returns None": (lambda: None, "missing"),
    "returns text": (lambda: Score("1.0"), "bad_type"),
    "returns NaN": (lambda: Score(float("nan")), "not_finite"),
    "returns infinity": (lambda: Score(float("inf")), "not_finite"),
    "returns too much": (lambda: Score(1.0, {f"part {k}": 1.0 for k in range(10_000)}), "bad_type"),
    "sleeps": (_hang, "timeout"),
    "spins": (_spin, "timeout"),
    "eats memory": (lambda: Score(float(len(bytearray(1 << 40)))), "memory"),
    "eats memory bit by bit": (lambda: Score(float(len([bytearray(1 << 24) for _ in range(1 << 16)]))), "memory"),
    "exits": (lambda: sys.exit(0), "exception"),
    "exits hard": (lambda: os._exit(0), "crash"),
    "segfaults": (lambda: ctypes.string_at(0), "crash"),
    "kills itself": (lambda: os.kill(os.getpid(), 9), "crash"),
    "floods its output": (_flood, ""),
    "leaves a child": (lambda: _leave_child(own_session=False), ""),
    "leaves a daemon": (lambda: _leave_child(own_session=True), ""),
    "forks and comes back twice": (_come_back_twice, ""),
    "closes everything": (_close_everything, "crash"),
    "babbles": (_babble, "crash"),
}
"""What the response asks for: the deed, and the cause under which it is counted; none if it is scored all the same."""


class Faulty(BaseReward):
    """1.0, or the fault that the response names.

    Args:
        weight: Factor in the sum of rewards.
        scale: Multiplies the length of a response that names none.
    """

    def __init__(self, weight: float = 1.0, scale: tuple[float, ...] = (1.0,)) -> None:
        super().__init__(weight)
        assert isinstance(scale, tuple)
        self.scale = scale

    def score(self, rollout: Rollout) -> Score:
        if rollout.text in FAULTS:
            return FAULTS[rollout.text][0]()
        return Score(self.scale[0] * len(rollout.text))


class Grader(Faulty):
    """A grader that only a hostile text can hang."""

    components = ("accuracy",)
    text_at_fault = True

    def score(self, rollout: Rollout) -> Score:
        score = super().score(rollout)
        return Score(score.value, {"accuracy": score.value})


class ByRank(BaseReward):
    """Scores samples together: 1 for the longest response of the call."""

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError("samples are compared")

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        if any(rollout.text == "short" for rollout in rollouts):
            return [Score(1.0)]
        longest = max(len(rollout.text) for rollout in rollouts)
        return [Score(float(len(rollout.text) == longest)) for rollout in rollouts]


class Redness(BaseReward):
    """Mean of the red channel of the prompt's first image."""

    needs_images = True

    def score(self, rollout: Rollout) -> Score:
        image = rollout.prompt.images[0]
        return Score(sum(image.getchannel("R").tobytes()) / (image.width * image.height))


class Blind(BaseReward):
    """Wants images and did not say so."""

    def score(self, rollout: Rollout) -> Score:
        return Score(float(len(rollout.prompt.images)))


class Unbuildable(BaseReward):
    """Its constructor fails everywhere but in the process of the test."""

    home = 0

    def __init__(self) -> None:
        super().__init__()
        if os.getpid() != Unbuildable.home:
            raise OSError("no vocabulary here")

    def score(self, rollout: Rollout) -> Score:
        return Score(1.0)


class Echo(BaseReward):
    """Whether the rollout arrived as it was sent; the test fills in what that is."""

    def score(self, rollout: Rollout) -> Score:
        prompt = rollout.prompt
        seen = {
            "ids": float(rollout.response_ids.sum()),
            "mask": float(rollout.response_mask.sum()),
            "logp": float(rollout.engine_logprobs.sum()),
            "demo": -1.0 if rollout.demo_mask is None else float(rollout.demo_mask.sum()),
            "prompt": float(rollout.prompt_ids.sum()),
            "turns": float(sum(turn.stop for turn in rollout.turns)),
            "slots": float(sum(message.image_slots for message in prompt.messages)),
        }
        same = (prompt.metadata["note"], prompt.answer, rollout.finish_reason) == ("\ud800 é", "4", "length")
        return Score(float(same), seen)


class Unlucky(BaseReward):
    """Crashes over the prompts that it is told.

    Args:
        uids: Of these prompts.
    """

    def __init__(self, uids: list[str]) -> None:
        super().__init__()
        self.uids = uids

    def score(self, rollout: Rollout) -> Score:
        if rollout.prompt.uid in self.uids:
            os._exit(1)
        return Score(float(len(rollout.text) % 2))
