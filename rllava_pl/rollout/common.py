"""Base classes of the engines: one batch for each ``start``, and what vLLM reads and answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch

from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.types import Generation, Request, Sampling

BAN = -100.0
"""Logit bias of tokens that are never sampled; vLLM allows no lower one, and e^-100 never happens."""


class BatchEngine:
    """A rollout engine whose ``advance`` completes everything that was started; subclasses define ``sample``.

    Args:
        policy: The trained one: its tokenizer, its action space.
    """

    context_tokens = 0
    """Longest prompt and response together, for engines with a limit."""
    images = 0
    """Most images of a prompt, for engines with a limit."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.version = -1
        self._started: tuple[Sequence[Request], Sampling] | None = None

    @property
    def exact(self) -> bool:
        """False: other kernels than the trainer's, other rounding."""
        return False

    def check(self, request: Request, sampling: Sampling) -> None:
        """Refuse a request that cannot be sampled, here one whose given tokens no response can continue.

        Raises:
            ValueError: Naming the prompt.
        """
        if misplaced := {*self.policy.banned_ids, *self.policy.stop_ids}.intersection(request.prefix_ids):
            tokens = self.policy.tokenizer.convert_ids_to_tokens(sorted(misplaced))
            raise ValueError(
                f"prefix_ids of prompt {request.prompt.uid!r} hold {tokens}; a response can continue text only, not an "
                "end token or a token that stands for image content"
            )

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Complete every request once a seed; handles count from 0 in the order of requests and seeds."""
        raise NotImplementedError

    def start(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """See ``RolloutEngine``; refuses requests that do not pass ``check``."""
        for request in requests:
            self.check(request, sampling)
        self._started = requests, sampling
        return list(range(sum(len(request.seeds) for request in requests)))

    def advance(self) -> list[Generation]:
        """All samples that were started. Ranks in lockstep call it together, also those that started none."""
        started, self._started = self._started, None
        return self.sample(*started) if started else []

    def reset_caches(self) -> None:
        """Drop results that were computed with older weights; there are none by default."""

    def fall_back(self) -> bool:
        """Use a safer memory mode from now on; False if there is none."""
        return False

    def sleep(self) -> None:
        """Free memory until the next ``wake``; does nothing by default."""

    def wake(self) -> None:
        """Be ready to sample; does nothing by default."""

    def close(self) -> None:
        """Free everything; idempotent."""


class VLLMBase(BatchEngine):
    """What vLLM engines share, in this process or on servers: checks of requests, parameters, samples."""

    context_option = ""
    """What sets the length of the context, for errors."""

    def check(self, request: Request, sampling: Sampling) -> None:
        """Refuse also what vLLM would refuse, or change without an error.

        Raises:
            RuntimeError: The engine does not have the policy's weights.
            ValueError: Naming the prompt: too long with its response, or too many images.
        """
        if self.version < 0:
            raise RuntimeError("the engine's weights are not the policy's: there was no complete sync")
        uid, prompt, given = request.prompt.uid, len(request.inputs), len(request.prefix_ids)
        needed, shown = prompt + given + sampling.max_tokens, len(request.prompt.images)
        if needed > self.context_tokens:
            raise ValueError(
                f"prompt {uid!r}: {prompt} prompt tokens + {given} given + sampling.max_tokens {sampling.max_tokens} = "
                f"{needed}, but the engine's context has {self.context_tokens}; raise {self.context_option}, or lower "
                "sampling.max_tokens"
            )
        if shown > self.images:
            raise ValueError(
                f"prompt {uid!r} shows {shown} images, but the engine takes {self.images}; raise images_per_prompt"
            )
        super().check(request, sampling)

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt with one placeholder an image, which vLLM expands, and the tokens given with it."""
        ids = request.inputs.input_ids_S.tolist()
        if request.prompt.images:
            ids = unexpanded_ids(self.policy.processor, request.prompt)
        return [*ids, *request.prefix_ids]

    def parameters(self, request: Request, sampling: Sampling) -> dict[str, object]:
        """All of ``vllm.SamplingParams``, so that neither its defaults nor ``generation_config.json`` apply.

        Sample k of a request draws with its first seed + k, as vLLM numbers the samples of a group.
        """
        return {
            "n": len(request.seeds) if sampling.temperature else 1,  # a greedy response is the same for every seed
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
            "logit_bias": dict.fromkeys(self.policy.banned_ids, BAN),
            "ignore_eos": True,  # the stop tokens below are the policy's end tokens
            "stop_token_ids": list(self.policy.stop_ids),
            "detokenize": False,
        }

    def generations(
        self,
        request: Request,
        handle: int,
        prompt_ids: Sequence[int],
        samples: Sequence[tuple[Sequence[int], Sequence[float], str | None]],
    ) -> list[Generation]:
        """One generation a seed, of ``(ids, logprobs, finish_reason)`` of each sample; handles count from ``handle``.

        A greedy sample serves all seeds. An end that is neither a stop token nor the budget is an abort.
        """
        prompt = torch.tensor(prompt_ids[: len(prompt_ids) - len(request.prefix_ids)], dtype=torch.int64)
        return [
            Generation(
                handle=handle + k,
                prompt_ids=prompt,
                ids_T=torch.tensor(ids, dtype=torch.int64),
                logprobs_T=torch.tensor(logp, dtype=torch.float32).clamp(max=0.0),
                finish_reason="stop" if reason == "stop" else "length" if reason == "length" else "abort",
                weight_version=self.version,
            )
            for k, (ids, logp, reason) in zip(range(len(request.seeds)), cycle(samples), strict=False)
        ]
