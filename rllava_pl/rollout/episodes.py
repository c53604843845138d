"""Episodes: requests go to an engine, and what it sampled is checked once and becomes rollouts.

A single-turn episode ends with the first turn, so ``RolloutEngine.advance`` is called once: every request is a rollout
of one sampled segment, behind a given one if the request has ``prefix_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rllava_pl.models.policy import Policy
from rllava_pl.types import Generation, Request, Rollout, RolloutEngine, Sampling, Segment


class GenerationError(RuntimeError):
    """An engine returned something else than what was requested."""


def run_episodes(
    engine: RolloutEngine, policy: Policy, requests: Sequence[Request], sampling: Sampling
) -> list[Rollout]:
    """Complete every request once a seed; collective.

    Args:
        engine: With the weights of ``policy``.
        policy: Decodes responses, and defines which tokens may be sampled.
        requests: May be empty, which an engine that computes in lockstep with other ranks takes part in.
        sampling: Budget and temperature.

    Returns:
        Rollouts in the order of requests and seeds.

    Raises:
        GenerationError: The engine's answer cannot be trained on; see ``check_generations``.
    """
    handles = engine.start(requests, sampling)
    generations = list(engine.advance())
    while len(generations) < len(handles) and (finished := engine.advance()):
        generations += finished
    by_handle = {generation.handle: generation for generation in generations}
    if len(generations) != len(handles):
        raise GenerationError(f"the engine was asked for {len(handles)} samples and returned {len(generations)}")
    if by_handle.keys() != set(handles):
        raise GenerationError("the engine returned a sample twice, or one that was not requested")
    expected = [request for request in requests for _ in request.seeds]
    generations = [by_handle[handle] for handle in handles]
    check_generations(expected, generations, sampling, policy, engine.version)
    return [_rollout(policy, *pair) for pair in zip(expected, generations, strict=True)]


def _rollout(policy: Policy, request: Request, generation: Generation) -> Rollout:
    sampled = Segment(generation.ids_T, logprobs_T=generation.logprobs_T, weight_version=generation.weight_version)
    given = Segment(torch.tensor(request.prefix_ids, dtype=torch.int64), "given")
    segments = (given, sampled) if len(given) else (sampled,)
    text = policy.decode(torch.cat([segment.ids_T for segment in segments]))
    return Rollout(request.prompt, request.group, request.inputs, segments, generation.finish_reason, text)


def check_generations(
    requests: Sequence[Request], generations: Sequence[Generation], sampling: Sampling, policy: Policy, version: int
) -> None:
    """Check one generation a request, in order, before it is trained on.

    Raises:
        GenerationError: Naming the prompt: other prompt tokens than the trainer's, stale weights, lengths that differ
            or exceed the budget, tokens that cannot be sampled, log-probs that are positive or not finite.
    """
    for request, generation in zip(requests, generations, strict=True):
        if fault := _fault(request, generation, sampling, version):
            raise GenerationError(f"rollout of prompt {request.prompt.uid!r}: {fault}")
    if not generations:
        return
    ids, logp = (torch.cat([getattr(g, name) for g in generations]) for name in ("ids_T", "logprobs_T"))
    banned = torch.isin(ids, torch.tensor(policy.banned_ids, dtype=torch.int64))
    vocabulary = policy.model.config.get_text_config().vocab_size
    for wrong, fault in (
        ((ids < 0) | (ids >= vocabulary) | banned, "a token is banned, or outside of the vocabulary"),
        (~((logp <= 1e-6) & torch.isfinite(logp)), "a log-prob is positive or not finite"),
    ):
        if wrong.any():
            raise GenerationError(f"rollout of prompt {_first(wrong, requests, generations)!r}: {fault}")


def _first(wrong: Tensor, requests: Sequence[Request], generations: Sequence[Generation]) -> str:
    """Prompt of the first token that is wrong, of all tokens in a row."""
    lengths = torch.tensor([len(generation.ids_T) for generation in generations])
    row_of_token = torch.arange(len(requests)).repeat_interleave(lengths)
    return requests[int(row_of_token[wrong][0])].prompt.uid


def _fault(request: Request, generation: Generation, sampling: Sampling, version: int) -> str:
    ids = request.inputs.input_ids_S
    if generation.prompt_ids is not ids and not torch.equal(generation.prompt_ids, ids):
        return (
            f"the engine read {len(generation.prompt_ids)} prompt tokens, the trainer {len(ids)}, and they must be "
            "equal; look for image placeholders that were expanded twice or another chat template"
        )
    if generation.weight_version != version:
        return f"sampled with weights of update {generation.weight_version}, the policy is at update {version}"
    tokens, logprobs = len(generation.ids_T), len(generation.logprobs_T)
    if tokens != logprobs:
        return f"{tokens} tokens were sampled with {logprobs} log-probs"
    if tokens > sampling.max_tokens:
        return f"{tokens} tokens were sampled, more than sampling.max_tokens {sampling.max_tokens}"
    return ""
