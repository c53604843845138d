"""Episodes: requests go to an engine, and what it sampled is checked once and becomes rollouts.

A single-turn episode ends with the first turn, so ``RolloutEngine.advance`` is called once: every request is a rollout
of one sampled segment, behind a given one if the request has ``prefix_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rllava_pl.models.policy import Policy
from rllava_pl.types import Generation, Request, Rollout, RolloutEngine, Sampling, Segment


class GenerationError(RuntimeError):
    """An engine returned something else than what was requested."""


def run_episodes(
    engine: RolloutEngine, policy: Policy, requests: Sequence[Request], sampling: Sampling
) -> list[Rollout]:
    """Complete every request once a seed, with an engine that has the weights of ``policy``; collective.

    ``requests`` may be empty: an engine that computes in lockstep with other ranks takes part all the same.

    Returns:
        Rollouts in the order of requests and seeds.

    Raises:
        GenerationError: Naming the prompt where there is one: samples that are missing or were not requested, other
            prompt tokens than the trainer's, stale weights, lengths that differ or exceed the budget, tokens that
            cannot be sampled, log-probs that are positive or not finite.
    """
    handles = engine.start(requests, sampling)
    finished = list(engine.advance())
    while len(finished) < len(handles) and (more := engine.advance()):
        finished += more
    by_handle = {generation.handle: generation for generation in finished}
    if len(finished) != len(handles):
        raise GenerationError(f"the engine was asked for {len(handles)} samples and returned {len(finished)}")
    if by_handle.keys() != set(handles):
        raise GenerationError("the engine returned a sample twice, or one that was not requested")
    expected = [request for request in requests for _ in request.seeds]
    samples = list(zip(expected, (by_handle[handle] for handle in handles), strict=True))
    for request, generation in samples:
        if fault := _fault(request, generation, sampling, engine.version):
            raise GenerationError(f"rollout of prompt {request.prompt.uid!r}: {fault}")
    _check_tokens(samples, policy)
    rollouts = []
    for request, generation in samples:
        sampled = Segment(generation.ids_T, logprobs_T=generation.logprobs_T, weight_version=generation.weight_version)
        segments: tuple[Segment, ...] = (sampled,)
        if request.prefix_ids:
            segments = (Segment(torch.tensor(request.prefix_ids, dtype=torch.int64), "given"), sampled)
        text = policy.decode(torch.cat([x.ids_T for x in segments]) if request.prefix_ids else sampled.ids_T)
        rollouts.append(
            Rollout(request.prompt, request.group, request.inputs, segments, generation.finish_reason, text)
        )
    return rollouts


def _check_tokens(samples: Sequence[tuple[Request, Generation]], policy: Policy) -> None:
    """Refuse tokens that cannot be sampled and log-probs that are none, of all samples at once."""
    if not samples:
        return
    ids, logp = (
        torch.cat([getattr(generation, name) for _, generation in samples]) for name in ("ids_T", "logprobs_T")
    )
    banned = torch.isin(ids, torch.tensor(policy.banned_ids, dtype=torch.int64))
    vocabulary = policy.model.config.get_text_config().vocab_size
    for wrong, fault in (
        ((ids < 0) | (ids >= vocabulary) | banned, "a token is banned, or outside of the vocabulary"),
        (~((logp <= 1e-6) & torch.isfinite(logp)), "a log-prob is positive or not finite"),
    ):
        if wrong.any():
            uids = [request.prompt.uid for request, sample in samples for _ in sample.ids_T]
            raise GenerationError(f"rollout of prompt {uids[int(wrong.nonzero()[0])]!r}: {fault}")


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
