"""Rewards that fail on request: the response names the fault. Importable, so that a worker process can build them."""

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
    """A child process that outlives the worker, as a daemon if it has a session."""
    if os.fork() == 0:
        if own_session:
            os.setsid()
            if os.fork():
                os._exit(0)
        time.sleep(1000)
        os._exit(0)
    return Score(1.0)


def _return_twice() -> Score:
    os.fork()
    return Score(1.0)


def _close_everything() -> Score:
    os.closerange(0, 100)
    return Score(1.0)


def _write_garbage() -> Score:
    """Bytes that are not a frame, to every open descriptor."""
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
    "forks and returns twice": (_return_twice, ""),
    "closes everything": (_close_everything, "crash"),
    "writes garbage": (_write_garbage, "crash"),
}
"""By response: what the reward does, and the cause under which the sample is counted; "" if it is scored."""


class Faulty(BaseReward):
    """Length of the response times weight and scale, or the fault that the response names.

    Args:
        weight: Factor in the sum of rewards.
        scale: Factor of the length; its first item counts.
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
        if rollout.text == "does not apply":
            return Score.not_applicable()
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


class ImageCount(BaseReward):
    """Reads images without declaring needs_images."""

    def score(self, rollout: Rollout) -> Score:
        images = [*rollout.prompt.images, *(image for segment in rollout.segments for image in segment.images)]
        return Score(float(len(images)))


class Unbuildable(BaseReward):
    """Its constructor fails in every process but that of the test."""

    home = 0

    def __init__(self) -> None:
        super().__init__()
        if os.getpid() != Unbuildable.home:
            raise OSError("no vocabulary here")

    def score(self, rollout: Rollout) -> Score:
        return Score(1.0)


class Echo(BaseReward):
    """Whether the rollout arrived as it was sent, and sums over what it consists of."""

    def score(self, rollout: Rollout) -> Score:
        prompt = rollout.prompt
        seen = {
            "ids": float(rollout.response_ids.sum()),
            "sampled": float(rollout.sampled_mask.sum()),
            "logp": float(rollout.engine_logprobs.sum()),
            "given": float(sum(segment.origin == "given" for segment in rollout.segments)),
            "prompt": float(rollout.inputs.input_ids_S.sum()),
            "version": float(sum(rollout.weight_versions)),
            "steps": float(sum(rollout.step_rewards)),
            "slots": float(sum(message.image_slots for message in prompt.messages)),
        }
        expected = ({"note": "\ud800 \u00e9", "boxes": [[1, 2.5]]}, {"text": "4"}, "length")
        return Score(float((prompt.metadata, prompt.answer, rollout.finish_reason) == expected), seen)


class Unlucky(BaseReward):
    """Ends its process over some prompts.

    Args:
        uids: Uids of these prompts.
    """

    def __init__(self, uids: list[str]) -> None:
        super().__init__()
        self.uids = uids

    def score(self, rollout: Rollout) -> Score:
        if rollout.prompt.uid in self.uids:
            os._exit(1)
        return Score(float(len(rollout.text) % 2))
