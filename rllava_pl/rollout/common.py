"""What engines share: checks of a request, the sampling parameters of vLLM, and how answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.types import FinishReason, Request, Sampling

BAN = -100.0
"""Logit bias of tokens that are never sampled; vLLM allows no lower one, and e^-100 never happens."""


class SamplingParameters(TypedDict):
    """The arguments of ``vllm.SamplingParams``, and the field ``sampling_params`` of a server's request."""

    n: int
    seed: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    logit_bias: dict[int, float]
    ignore_eos: bool
    stop_token_ids: list[int]
    detokenize: bool


def handles_of(requests: Sequence[Request]) -> list[int]:
    """One handle a sample, counted from 0, in the order of requests and seeds."""
    return list(range(sum(len(request.seeds) for request in requests)))


def sampling_parameters(request: Request, sampling: Sampling, policy: Policy) -> SamplingParameters:
    """All parameters, so that neither vLLM's defaults nor the model's ``generation_config.json`` apply.

    Sample k of a request draws with its first seed + k, as vLLM numbers the samples of a group.
    """
    return {
        "n": len(request.seeds) if sampling.temperature else 1,  # the most likely answer is the same for every seed
        "seed": request.seeds[0] % 2**62,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the sampled token alone
        "logit_bias": dict.fromkeys(policy.banned_ids, BAN),
        "ignore_eos": True,  # the stop tokens below are the policy's end tokens
        "stop_token_ids": list(policy.stop_ids),
        "detokenize": False,
    }


def vllm_prompt_ids(request: Request, policy: Policy) -> list[int]:
    """What vLLM reads: the prompt with one placeholder an image, which it expands, and the tokens given with it."""
    ids = request.inputs.input_ids_S.tolist()
    if request.prompt.images:
        ids = unexpanded_ids(policy.processor, request.prompt)
    return [*ids, *request.prefix_ids]


def check_prefix(request: Request, policy: Policy) -> None:
    """Refuse given tokens that no response can continue.

    Raises:
        ValueError: An end token, or a token that stands for image content; names the prompt.
    """
    if misplaced := {*policy.banned_ids, *policy.stop_ids}.intersection(request.prefix_ids):
        tokens = policy.tokenizer.convert_ids_to_tokens(sorted(misplaced))
        raise ValueError(
            f"prefix_ids of prompt {request.prompt.uid!r} hold {tokens}; a response can continue text only, not an end "
            "token or a token that stands for image content"
        )


def check_request(
    request: Request, sampling: Sampling, policy: Policy, *, context_tokens: int, images: int, option: str
) -> None:
    """Refuse what vLLM would refuse, or change without saying so.

    Args:
        request: To be sampled.
        sampling: Its budget counts.
        policy: The trainer's.
        context_tokens: Longest prompt and response together.
        images: Most images of a prompt.
        option: Names what sets the context, for the error.

    Raises:
        ValueError: Naming the prompt: too long with its response, too many images, or misplaced given tokens.
    """
    uid, prompt, given = request.prompt.uid, len(request.inputs), len(request.prefix_ids)
    needed = prompt + given + sampling.max_tokens
    if needed > context_tokens:
        raise ValueError(
            f"prompt {uid!r}: {prompt} prompt tokens + {given} given + sampling.max_tokens {sampling.max_tokens} = "
            f"{needed}, but the engine's context has {context_tokens}; raise {option}, or lower sampling.max_tokens"
        )
    if len(request.prompt.images) > images:
        raise ValueError(
            f"prompt {uid!r} shows {len(request.prompt.images)} images, but the engine takes {images} a prompt; raise "
            "images_per_prompt"
        )
    check_prefix(request, policy)


def finish_reason(name: object) -> FinishReason:
    """The reason as ``Generation`` has it; what is neither an end token nor the budget is an abort."""
    return "stop" if name == "stop" else "length" if name == "length" else "abort"
