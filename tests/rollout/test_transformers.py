"""The embedded engine: what it samples is what is trained, and a sample depends on its seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from rllava_pl.functional.seeds import uniforms
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.transformers import TransformersEngine
from rllava_pl.types import PolicyBatch, Prompt, Request, Rollout, Sampling
from tests.models.conftest import FAMILIES, prompts

SAMPLING = Sampling(max_tokens=6)
HINTS = ("", "<answer>red", "", "It is ")
"""Texts given with the prompts of 0, 1, 3 and 2 images; two of them begin with nothing."""


def requests(policy: Policy, batch: Sequence[Prompt], samples: int = 3, first_seed: int = 100) -> list[Request]:
    seeds = [tuple(first_seed + 10 * p + g for g in range(samples)) for p in range(len(batch))]
    return [Request(q, x, p, seeds[p]) for p, (q, x) in enumerate(zip(batch, policy.encode(batch), strict=True))]


def hinted(policy: Policy, batch: Sequence[Request]) -> list[Request]:
    """The requests with their hints, which are without an end token."""
    hints = [tuple(policy.encode_response(hint).tolist()[:-1]) for hint in HINTS]
    return [dataclasses.replace(request, prefix_ids=hint) for request, hint in zip(batch, hints, strict=True)]


def generate(
    policy: Policy, batch: Sequence[Request], sampling: Sampling = SAMPLING, **options: object
) -> list[Rollout]:
    return run_episodes(TransformersEngine(policy, **options), policy, batch, sampling)


def scored(policy: Policy, rollouts: Sequence[Rollout], group_size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the engine and of the trainer, (N, T) each."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask, logp = (
        pad([getattr(r, name) for r in rollouts], batch_first=True)
        for name in ("response_ids", "trained_mask", "engine_logprobs")
    )
    with torch.no_grad():
        batch = PolicyBatch(tuple(r.inputs for r in rollouts[::group_size]), group_size, ids, mask)
        return logp, policy(batch).logp_NT


def same(a: Rollout, b: Rollout) -> bool:
    return torch.equal(a.response_ids, b.response_ids) and torch.allclose(
        a.engine_logprobs, b.engine_logprobs, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_log_probs_equal_the_trainers(load: Callable[..., Policy], family: str, temperature: float) -> None:
    policy = load(family)
    policy.temperature = temperature
    batch = requests(policy, prompts([0, 1, 3, 2]))
    rollouts = generate(policy, batch, dataclasses.replace(SAMPLING, temperature=temperature))
    engine, trainer = scored(policy, rollouts)
    torch.testing.assert_close(trainer, engine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_given_tokens_are_conditioned_on_and_not_sampled(
    load: Callable[..., Policy], family: str, temperature: float
) -> None:
    policy = load(family)
    policy.temperature = temperature
    batch = hinted(policy, requests(policy, prompts([0, 1, 3, 2])))
    rollouts = generate(policy, batch, dataclasses.replace(SAMPLING, temperature=temperature))
    given_N = torch.tensor([len(request.prefix_ids) for request in batch]).repeat_interleave(3)
    assert given_N[3] != given_N[9] and min(given_N[3], given_N[9]) > 0
    for n, (rollout, given) in enumerate(zip(rollouts, given_N.tolist(), strict=True)):
        request, tokens = batch[n // 3], len(rollout.response_ids)
        assert rollout.inputs is request.inputs
        assert tuple(rollout.response_ids[:given].tolist()) == request.prefix_ids
        assert given < tokens <= given + 6 and (rollout.finish_reason == "length") <= (tokens == given + 6)
        origins = [("given", given), ("sampled", tokens - given)] if given else [("sampled", tokens)]
        assert [(segment.origin, len(segment)) for segment in rollout.segments] == origins
        assert rollout.sampled_mask.tolist() == [False] * given + [True] * (tokens - given)
        assert rollout.trained_mask.tolist() == [True] * tokens
        assert rollout.text == policy.decode(rollout.response_ids) and rollout.text.startswith(HINTS[n // 3])
    engine, trainer = scored(policy, rollouts)
    sampled = torch.arange(engine.shape[1]) >= given_N[:, None]
    torch.testing.assert_close(engine, trainer.masked_fill(~sampled, 0.0), atol=1e-5, rtol=0)
    assert trainer[3, 0] < 0  # the trainer scores given tokens as well


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_first_sampled_token_uses_the_first_number_of_its_seed(load: Callable[..., Policy], family: str) -> None:
    """Against a loop that reads prompt, given and drawn tokens again for every token."""
    policy = load(family)
    batch = hinted(policy, requests(policy, prompts([0, 1, 3, 2]), samples=1))
    for request, rollout in zip(batch, generate(policy, batch), strict=True):
        response = list(request.prefix_ids)
        for t in range(len(rollout.response_ids) - len(response)):
            with torch.no_grad():
                logits_V = policy.model(**policy.collate([extend(request.inputs, response)])).logits[0, -1].double()
            cumulative_V = logits_V.index_fill(0, torch.tensor(policy.banned_ids), -torch.inf).softmax(-1).cumsum(-1)
            u = float(uniforms(torch.tensor(request.seeds), t))
            response.append(int((cumulative_V <= u).sum()))
        assert rollout.response_ids.tolist() == response


@pytest.mark.parametrize("name", ["the end token", "an image token"])
def test_given_end_or_image_token_is_refused(load: Callable[..., Policy], name: str) -> None:
    policy = load("idefics3")
    token = policy.stop_ids[0] if name == "the end token" else policy.model.config.image_token_id
    first, second = requests(policy, prompts([1, 1]))
    broken = dataclasses.replace(second, prefix_ids=(20, token))
    word = {"the end token": r"<\|im_end\|>", "an image token": "<image>"}[name]
    with pytest.raises(
        ValueError, match=rf"prefix_ids of prompt 'test:1' hold \['{word}'\]; a response can continue text only"
    ):
        generate(policy, [first, broken])


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_sample_depends_on_its_seed_alone(load: Callable[..., Policy], family: str) -> None:
    """Not on the batch, not on its place in it, not on how many prompts are sampled at a time."""
    policy = load(family)
    batch = requests(policy, prompts([0, 1, 3, 2]))
    together = generate(policy, batch)
    in_twos = generate(policy, batch, batch_prompts=2)
    backwards = generate(policy, batch[::-1])
    alone = [generate(policy, [request]) for request in batch]
    for p in range(4):
        for g in range(3):
            sample = together[3 * p + g]
            assert same(sample, in_twos[3 * p + g])
            assert same(sample, backwards[3 * (3 - p) + g])
            assert same(sample, alone[p][g])


def test_seeds_give_different_samples_and_equal_seeds_equal_ones(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    (request,) = requests(policy, prompts([1]), samples=12)
    rollouts = generate(policy, [request])
    assert len({tuple(r.response_ids.tolist()) for r in rollouts}) > 8
    twins = dataclasses.replace(request, seeds=(7, 7, 8))
    first, second, third = generate(policy, [twins])
    assert same(first, second) and not same(first, third)


def test_requests_may_differ_in_their_number_of_samples(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    first, second = requests(policy, prompts([1, 2]))
    single = dataclasses.replace(second, seeds=second.seeds[:1])
    rollouts = generate(policy, [first, single])
    assert [r.prompt.uid for r in rollouts] == ["test:0"] * 3 + ["test:1"]
    assert same(rollouts[3], generate(policy, [second])[0])


@pytest.mark.parametrize("family", ["idefics3", "llava", "qwen2_vl"])
def test_fallback_through_generate_draws_the_same_samples(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    batch = hinted(policy, requests(policy, prompts([0, 1, 3, 2])))
    expected = generate(policy, batch)
    policy.model_family = dataclasses.replace(policy.model_family, causal=False)
    fallback = generate(policy, batch)
    for a, b in zip(expected, fallback, strict=True):
        assert same(a, b) and (a.finish_reason, a.text) == (b.finish_reason, b.text)


def test_greedy_sampling_takes_the_most_likely_token(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    batch = requests(policy, prompts([1, 2]), samples=1)
    greedy = generate(policy, batch, dataclasses.replace(SAMPLING, temperature=0.0))
    inputs = policy.collate([request.inputs for request in batch])
    del inputs["position_ids"]
    suppressed = policy.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=policy.banned_ids, eos_token_id=policy.stop_ids
    )[:, inputs["input_ids"].shape[1] :]
    for rollout, ids in zip(greedy, suppressed, strict=True):
        assert rollout.response_ids.tolist() == ids[: len(rollout.response_ids)].tolist()


def test_greedy_log_probs_are_those_of_the_policy(load: Callable[..., Policy]) -> None:
    """The most likely tokens are the same at every temperature, their log-probs are not."""
    policy = load("idefics3")
    batch, greedy = requests(policy, prompts([1, 2]), samples=1), dataclasses.replace(SAMPLING, temperature=0.0)
    at_one = generate(policy, batch, greedy)
    policy.temperature = 0.7
    rollouts = generate(policy, batch, greedy)
    engine, trainer = scored(policy, rollouts, group_size=1)
    torch.testing.assert_close(trainer, engine, atol=1e-5, rtol=0)
    for cool, warm in zip(rollouts, at_one, strict=True):
        assert torch.equal(cool.response_ids, warm.response_ids)
        assert not torch.allclose(cool.engine_logprobs, warm.engine_logprobs, atol=1e-3)


def test_token_frequencies_match_probabilities(load: Callable[..., Policy]) -> None:
    """First tokens of 4,000 samples against their probabilities: within 5 standard errors each."""
    policy = load("idefics3")
    (request,) = requests(policy, prompts([1]), samples=4000)
    rollouts = generate(policy, [request], Sampling(max_tokens=1))
    ids = torch.tensor([int(r.response_ids[0]) for r in rollouts])
    p = torch.stack([r.engine_logprobs[0] for r in rollouts]).exp()
    for token in ids.unique():
        share, probability = float((ids == token).float().mean()), float(p[ids == token][0])
        assert abs(share - probability) < 5 * (probability * (1 - probability) / 4000) ** 0.5 + 1e-9


def test_responses_end_with_a_stop_token_or_the_budget(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    batch = requests(policy, prompts([1, 1, 2, 0]), samples=16)
    policy.stop_ids = list(range(20, 120))  # so that many rows end early and the batch shrinks on the way
    rollouts = generate(policy, batch, Sampling(max_tokens=8))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        stops = [20 <= i < 120 for i in r.response_ids.tolist()]
        assert not any(stops[:-1])
        assert stops[-1] == (r.finish_reason == "stop")
        assert r.finish_reason == "stop" or len(stops) == 8
        assert r.sampled_mask.all() and len(r.segments) == 1
    whole = load("idefics3")
    whole.stop_ids = policy.stop_ids
    alone = generate(whole, batch, Sampling(max_tokens=8), batch_prompts=1)
    assert all(same(a, b) for a, b in zip(rollouts, alone, strict=True))


def test_banned_tokens_are_never_sampled(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    head = policy.model.get_output_embeddings()
    policy.banned_ids = policy.banned_ids + list(range(150, head.weight.shape[0]))
    rollouts = generate(policy, requests(policy, prompts([1]), samples=64))
    drawn = {i for r in rollouts for i in r.response_ids.tolist()}
    assert not drawn & set(policy.banned_ids)


def test_training_mode_is_restored_and_gradient_checkpointing_changes_nothing(load: Callable[..., Policy]) -> None:
    plain, checkpointed = load("idefics3"), load("idefics3", gradient_checkpointing=True)
    batch = requests(plain, prompts([1, 2]))
    expected = generate(plain, batch)
    got = generate(checkpointed, batch)
    assert checkpointed.training
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_decoded_text_has_no_control_tokens(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    ids = policy.tokenizer("<answer>red</answer>", return_tensors="pt").input_ids[0]
    assert policy.decode(torch.cat([ids, torch.tensor([policy.stop_ids[0]])])) == "<answer>red</answer>"
