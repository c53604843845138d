"""An engine in step with the policy, and answers that are not what was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from rllava_pl.rollout.engine import ManagedEngine, check_rollouts
from rllava_pl.types import Message, Prompt, PromptInputs, Request, Rollout, Sampling


def request(uid: str, group: int, samples: int = 2, prefix_ids: tuple[int, ...] = ()) -> Request:
    prompt = Prompt(uid, (Message("user", ("Which digit is it?",)),))
    return Request(prompt, PromptInputs(torch.arange(4)), group, tuple(range(samples)), prefix_ids)


class Scripted:
    """Answers with two tokens a sample and writes down what it is told."""

    exact = True

    def __init__(self, spoil: Callable[[list[Rollout]], list[Rollout]] = lambda rollouts: rollouts) -> None:
        self.version = -1
        self.events: list[str] = []
        self.spoil = spoil

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        self.events.append("generate")
        logp, mask = torch.tensor([-0.5, -1.0]), torch.ones(2, dtype=torch.bool)
        rollouts = [
            Rollout(
                r.prompt, r.group, r.inputs.input_ids_S, r.inputs, torch.arange(2), logp, mask, "stop", self.version
            )
            for r in requests
            for _ in r.seeds
        ]
        return self.spoil(rollouts)

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.events.append(f"sync {[name for name, _ in named_tensors]} {version}")
        self.version = version

    def sleep(self) -> None:
        self.events.append("sleep")

    def wake(self) -> None:
        self.events.append("wake")

    def close(self) -> None:
        self.events.append("close")


def managed(engine: Scripted, version: Callable[[], int] = lambda: 3) -> ManagedEngine:
    return ManagedEngine(lambda: engine, lambda: [("lm_head.weight", torch.zeros(1))], version)


def test_weights_are_pushed_before_the_first_request_and_when_they_changed() -> None:
    engine, now = Scripted(), [3]
    session = managed(engine, lambda: now[0])
    for version in (3, 3, 5):
        now[0] = version
        session.generate([request("a", 0)], Sampling())
    session.close()
    session.close()
    sync3, sync5 = "sync ['lm_head.weight'] 3", "sync ['lm_head.weight'] 5"
    assert engine.events == [
        *["wake", sync3, "generate", "sleep"],
        *["wake", "generate", "sleep"],
        *["wake", sync5, "generate", "sleep"],
        "close",
    ]


def test_what_follows_a_sync_comes_before_sampling_and_may_sync_again() -> None:
    engine, now = Scripted(), [3]
    session = ManagedEngine(
        lambda: engine,
        lambda: [("lm_head.weight", torch.zeros(1))],
        lambda: now[0],
        after_sync=lambda managed: (engine.events.append("after"), managed.synchronise())[1],
    )
    session.generate([request("a", 0)], Sampling())
    session.generate([request("a", 0)], Sampling())
    sync = "sync ['lm_head.weight'] 3"
    assert engine.events == ["wake", sync, "after", sync, "generate", "sleep", "wake", "generate", "sleep"]


def test_the_engine_sleeps_also_after_an_error() -> None:
    def fail(rollouts: list[Rollout]) -> list[Rollout]:
        raise OSError("the engine died")

    engine = Scripted(fail)
    with pytest.raises(OSError, match="the engine died"):
        managed(engine).generate([request("a", 0)], Sampling())
    assert engine.events[-1] == "sleep"


def change(**fields: object) -> Callable[[list[Rollout]], list[Rollout]]:
    return lambda rollouts: [*rollouts[:-1], dataclasses.replace(rollouts[-1], **fields)]


FAULTS = {
    "too few": (lambda rollouts: rollouts[:-1], "was asked for 4 samples and returned 3"),
    "too many": (lambda rollouts: [*rollouts, rollouts[0]], "was asked for 4 samples and returned 5"),
    "out of order": (lambda rollouts: rollouts[::-1], "prompt 'a': the engine answered for prompt 'b' in its place"),
    "other group": (change(group=0), "prompt 'b': .* out of order"),
    "other prompt": (change(prompt_ids=torch.arange(7)), "prompt 'b': the engine read 7 prompt tokens, the trainer 4"),
    "stale": (change(weight_version=2), "sampled with weights of update 2, the policy is at update 3"),
    "ragged": (change(engine_logprobs=torch.zeros(3)), "ids, log-probs and mask have different lengths"),
    "nan": (change(engine_logprobs=torch.tensor([0.0, float("nan")])), "prompt 'b': a log-prob is positive or not"),
    "positive": (change(engine_logprobs=torch.tensor([0.0, 0.5])), "prompt 'b': a log-prob is positive or not finite"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_answer_of_the_engine_names_the_prompt(
    spoil: Callable[[list[Rollout]], list[Rollout]], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        managed(Scripted(spoil)).generate([request("a", 0), request("b", 1)], Sampling())


def begun(**fields: object) -> Rollout:
    """An answer to prompt "a" that begins with the given tokens 7 and 8 and goes on with one of the policy's own."""
    asked = request("a", 0)
    rollout = Rollout(
        asked.prompt,
        asked.group,
        asked.inputs.input_ids_S,
        asked.inputs,
        response_ids=torch.tensor([7, 8, 1]),
        engine_logprobs=torch.tensor([0.0, 0.0, -1.0]),
        response_mask=torch.ones(3, dtype=torch.bool),
        finish_reason="stop",
        weight_version=0,
        demo_mask=torch.tensor([True, True, False]),
    )
    return dataclasses.replace(rollout, **fields)


def test_a_response_may_begin_with_the_given_tokens() -> None:
    check_rollouts([request("a", 0, samples=1, prefix_ids=(7, 8))], [begun()], version=0)


PREFIX_FAULTS = {
    "left out": (
        {"response_ids": torch.tensor([1, 2, 3])},
        r"with the tokens \[1, 2\] instead of the given ones \[7, 8\]",
    ),
    "other order": ({"response_ids": torch.tensor([8, 7, 1])}, r"with the tokens \[8, 7\] instead of the given ones"),
    "too short": (
        {name: x[:1] for name, x in vars(begun()).items() if isinstance(x, torch.Tensor) and name != "prompt_ids"},
        r"with the tokens \[7\] instead of the given ones \[7, 8\]",
    ),
    "not marked": ({"demo_mask": None}, "demo_mask must be True at the 2 given tokens and nowhere else"),
    "marked in part": (
        {"demo_mask": torch.tensor([True, False, False])},
        "demo_mask must be True at the 2 given tokens",
    ),
    "marked too far": ({"demo_mask": torch.ones(3, dtype=torch.bool)}, "demo_mask must be True at the 2 given tokens"),
    "of another length": ({"demo_mask": torch.tensor([True, True])}, "demo_mask must be True at the 2 given tokens"),
}


@pytest.mark.parametrize(("fields", "message"), PREFIX_FAULTS.values(), ids=PREFIX_FAULTS.keys())
def test_given_tokens_that_did_not_come_back_name_the_prompt(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"rollout of prompt 'a': .*{message}"):
        check_rollouts([request("a", 0, samples=1, prefix_ids=(7, 8))], [begun(**fields)], version=0)


def test_tokens_nobody_gave_cannot_be_a_demonstration() -> None:
    with pytest.raises(RuntimeError, match="demo_mask must be True at the 0 given tokens and nowhere else"):
        check_rollouts([request("a", 0, samples=1)], [begun()], version=0)


def test_nothing_asked_nothing_returned() -> None:
    assert managed(Scripted()).generate([], Sampling()) == []
