"""Rollouts are assembled from what an engine sampled, and samples that cannot be trained on are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rllava_pl.rollout.episodes import GenerationError, run_episodes
from rllava_pl.types import Rollout, Sampling
from tests.rollout.scripted import POLICY, Change, Scripted, request


def run(engine: Scripted, *requests: object, max_tokens: int = 8) -> list[Rollout]:
    engine.sync([], 3)
    return run_episodes(engine, POLICY, requests, Sampling(max_tokens=max_tokens))


def test_rollout_of_a_request_is_one_sampled_segment() -> None:
    asked = request("a", 5, samples=1)
    (rollout,) = run(Scripted(), asked)
    (segment,) = rollout.segments
    assert (rollout.prompt, rollout.group, rollout.inputs) == (asked.prompt, 5, asked.inputs)
    assert (segment.origin, segment.ids_T.tolist(), segment.logprobs_T.tolist()) == ("sampled", [0, 1], [-0.5, -1.0])
    assert (rollout.weight_versions, rollout.finish_reason, rollout.text) == ((3,), "stop", "0 1")


def test_given_tokens_are_a_segment_before_the_sampled_one() -> None:
    (rollout,) = run(Scripted(), request("a", 0, samples=1, prefix_ids=(7, 8)))
    assert [(s.origin, s.ids_T.tolist(), s.weight_version) for s in rollout.segments] == [
        ("given", [7, 8], -1),
        ("sampled", [0, 1], 3),
    ]
    assert rollout.engine_logprobs.tolist() == [0.0, 0.0, -0.5, -1.0]
    assert rollout.sampled_mask.tolist() == [False, False, True, True] and rollout.trained_mask.all()
    assert rollout.text == "7 8 0 1"


def test_samples_that_finish_in_any_order_come_in_that_of_requests_and_seeds() -> None:
    engine = Scripted(at_a_time=3)
    rollouts = run(engine, request("a", 0), request("b", 1))
    assert [r.prompt.uid for r in rollouts] == ["a", "a", "b", "b"]
    assert engine.events.count("advance") == 2


def change(**fields: object) -> Change:
    """The last sample with other fields."""
    return lambda generations: [*generations[:-1], dataclasses.replace(generations[-1], **fields)]


FAULTS = {
    "too few": (lambda generations: generations[:-1], "was asked for 4 samples and returned 3"),
    "too many": (lambda generations: [*generations, generations[0]], "was asked for 4 samples and returned 5"),
    "twice": (change(handle=0), "returned a sample twice, or one that was not requested"),
    "unknown": (change(handle=7), "returned a sample twice, or one that was not requested"),
    "other prompt": (change(prompt_ids=torch.arange(7)), "prompt 'b': the engine read 7 prompt tokens, the trainer 4"),
    "stale": (change(weight_version=2), "prompt 'b': sampled with weights of update 2, the policy is at update 3"),
    "ragged": (change(logprobs_T=torch.zeros(3)), "prompt 'b': 2 tokens were sampled with 3 log-probs"),
    "nan": (change(logprobs_T=torch.tensor([0.0, float("nan")])), "prompt 'b': a log-prob is positive or not finite"),
    "positive": (change(logprobs_T=torch.tensor([0.0, 0.5])), "prompt 'b': a log-prob is positive or not finite"),
    "banned": (change(ids_T=torch.tensor([9, 1])), "prompt 'b': a token is banned, or outside of the vocabulary"),
    "no token": (change(ids_T=torch.tensor([0, 20])), "prompt 'b': a token is banned, or outside of the vocabulary"),
    "negative": (change(ids_T=torch.tensor([0, -1])), "prompt 'b': a token is banned, or outside of the vocabulary"),
}


@pytest.mark.parametrize(("changed", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faulty_sample_is_refused_by_the_name_of_its_prompt(changed: Change, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        run(Scripted(changed), request("a", 0), request("b", 1))


def test_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(GenerationError, match=r"2 tokens were sampled, more than sampling\.max_tokens 1"):
        run(Scripted(), request("a", 0), max_tokens=1)


def test_sample_without_tokens_is_allowed() -> None:
    empty = change(ids_T=torch.zeros(0, dtype=torch.int64), logprobs_T=torch.zeros(0), finish_reason="abort")
    assert len(run(Scripted(empty), request("a", 0))[-1].response_ids) == 0
