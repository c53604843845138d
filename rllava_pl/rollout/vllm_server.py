"""Rollouts from vLLM servers that somebody else started: token ids in, token ids out, weights over the same way.

A request carries the prompt's ids with one placeholder an image and the images themselves as PNG, never an address to
fetch them from. The answer carries the prompt's ids as the server expanded them, the sampled ids, their log-probs, and
the label of the weights that sampled each of them. A label names one sync of one run, so that a server which restarted
meanwhile, or was given weights by somebody else, is noticed in the very answer.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, rank
from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.rollout import vllm_routes as routes
from rllava_pl.rollout.vllm_http import (
    EventLoop,
    Json,
    Limits,
    Server,
    ServerError,
    base_url,
    check_host,
    new_client,
    require_client,
    under_watch,
)
from rllava_pl.rollout.vllm_routes import BAN
from rllava_pl.rollout.vllm_transfer import buckets, to_text
from rllava_pl.types import Request, Rollout, Sampling, Turn

if TYPE_CHECKING:
    from PIL.Image import Image


class VLLMServerEngine:
    """Rollouts from one or several vLLM servers, which receive the policy's weights.

    Args:
        urls: Addresses of the servers, ``http://host:port`` each; requests go round.
        policy: The one that is trained: its tokenizer, its action space.
        model: Name the servers give the model; by default whatever they serve.
        images: Most images of a prompt, as the servers were started for.
        concurrency: Requests, of a whole group each, that a server is given at a time.
        limits: How long to wait, how often to try again.
        allow_remote: Also servers at public addresses.
    """

    def __init__(
        self,
        urls: Sequence[str],
        policy: Policy,
        *,
        model: str = "",
        images: int = 4,
        concurrency: int = 64,
        limits: Limits = Limits(),  # noqa: B008  frozen
        allow_remote: bool = False,
    ) -> None:
        require_client()
        for url in urls:
            check_host(base_url(url), allow_remote=allow_remote)
        self.policy = policy
        self.model = model
        self.images = images
        self.version = -1
        self._label = ""
        self._probed = False
        self._client = new_client(limits)
        self.servers = [Server(base_url(url), self._client, limits, concurrency=concurrency) for url in urls]
        first = rank() % len(urls)  # ranks do not all begin with the same one
        self._turns = cycle(self.servers[first:] + self.servers[:first])
        self._loop: EventLoop | None = EventLoop()

    @property
    def context_tokens(self) -> int:
        """Longest prompt and response together that every server takes; 0 before the first sync."""
        return min(server.context_tokens for server in self.servers)

    @property
    def exact(self) -> bool:
        """False: other kernels, other rounding."""
        return False

    # -- sampling ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Complete every request once a seed; see ``RolloutEngine``.

        Sample k of a request draws with its first seed + k, as vLLM numbers the samples of a group.

        Raises:
            RuntimeError: There was no sync yet, or the last one failed.
            ServerError: A server is dead, hung, refuses a request or answers with other weights; names the prompt.
            ValueError: A request cannot be put to a server; names the prompt.
        """
        if not requests:
            return []
        if self.version < 0:
            raise RuntimeError("the servers' weights are not the policy's: there was no complete sync yet")
        turns = [(next(self._turns), request) for request in requests]
        for server, request in turns:
            self._check(request, sampling, server)
        work = [self._complete(server, request, sampling) for server, request in turns]
        answers = self._loop.run(under_watch(self.servers, work, sampling=True))
        return [rollout for answer in answers for rollout in answer]

    def _check(self, request: Request, sampling: Sampling, server: Server) -> None:
        uid, prompt, given = request.prompt.uid, len(request.inputs), len(request.prefix_ids)
        needed = prompt + given + sampling.max_tokens
        if needed > server.context_tokens:
            raise ValueError(
                f"prompt {uid!r}: {prompt} prompt tokens + {given} given tokens + sampling.max_tokens "
                f"{sampling.max_tokens} = {needed}, but the context of {server.url} has {server.context_tokens}; start "
                "it with a larger --max-model-len, or lower sampling.max_tokens"
            )
        if len(request.prompt.images) > self.images:
            raise ValueError(
                f"prompt {uid!r} shows {len(request.prompt.images)} images, and images_per_prompt is {self.images}; "
                "raise it here, and start the servers with --limit-mm-per-prompt accordingly"
            )
        if {*self.policy.banned_ids, *self.policy.stop_ids}.intersection(request.prefix_ids):
            raise ValueError(
                f"prefix_ids of prompt {uid!r} hold an end token or a token that stands for image content; a response "
                "goes on behind text only"
            )

    def _complete(
        self, server: Server, request: Request, sampling: Sampling
    ) -> Coroutine[object, object, list[Rollout]]:
        """The exchange with a server; what needs the tokenizer happens here already, in the caller's thread."""
        images = list(request.prompt.images)
        ids = unexpanded_ids(self.policy.processor, request.prompt) if images else request.inputs.input_ids_S.tolist()
        purpose = f"the {len(request.seeds)} samples of prompt {request.prompt.uid!r}"
        body: dict[str, Json] = {
            "token_ids": [*ids, *request.prefix_ids],
            "return_token_ids": True,
            "sampling_params": self._parameters(request, sampling),
        }
        if self.model:
            body["model"] = self.model

        async def exchange() -> list[Rollout]:
            async with server.slots:
                if images:
                    body["content_parts"] = await asyncio.to_thread(image_parts, images)
                answer = await routes.generate(server, purpose, body)
            try:
                return self._rollouts(request, answer)
            except (KeyError, TypeError, ValueError) as error:
                raise ServerError(f"vLLM server {server.url} at {purpose}: {error}") from error

        return exchange()

    def _parameters(self, request: Request, sampling: Sampling) -> dict[str, Json]:
        """All of them, so that neither defaults of the server nor of the model's ``generation_config.json`` count."""
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
            "logit_bias": {str(i): BAN for i in self.policy.banned_ids},
            "ignore_eos": True,  # the policy's own end tokens are all there are
            "stop_token_ids": list(self.policy.stop_ids),
            "detokenize": False,
        }

    def _rollouts(self, request: Request, answer: Mapping[str, Json]) -> list[Rollout]:
        """The samples of a group as rollouts.

        Raises:
            KeyError, TypeError, ValueError: The answer is not one to this request with these weights.
        """
        choices = sorted(
            cast("list[dict[str, Json]]", answer["choices"]), key=lambda choice: cast(int, choice["index"])
        )
        if len(choices) not in (1, len(request.seeds)):
            raise ValueError(f"{len(request.seeds)} samples were asked for and {len(choices)} came")
        prompt_ids = torch.tensor(cast("list[int]", answer["prompt_token_ids"]), dtype=torch.int64)
        prompt_ids = prompt_ids[: len(prompt_ids) - len(request.prefix_ids)]
        return [self._rollout(request, prompt_ids, choices[k % len(choices)]) for k in range(len(request.seeds))]

    def _rollout(self, request: Request, prompt_ids: Tensor, choice: Mapping[str, Json]) -> Rollout:
        given, sampled = len(request.prefix_ids), cast("list[int]", choice["token_ids"])
        content = cast("list[dict[str, float]]", cast("dict[str, Json]", choice["logprobs"])["content"])
        if [token["token_id"] for token in content] != sampled:
            raise ValueError("the log-probs are of other tokens than those that were sampled")
        labels = {span["version"] for span in cast("list[dict[str, str]]", choice["weight_versions"]) or []}
        if sampled and labels != {self._label}:
            raise ValueError(
                f"the answer was sampled with the weights {sorted(labels)}, not with {self._label!r}; the server was "
                "restarted, or somebody else gives it weights"
            )
        ids_T = torch.tensor([*request.prefix_ids, *sampled], dtype=torch.int64)
        logp = [0.0] * given + [token["logprob"] for token in content]
        return Rollout(
            prompt=request.prompt,
            group=request.group,
            prompt_ids=prompt_ids,
            inputs=request.inputs,
            response_ids=ids_T,
            engine_logprobs=torch.tensor(logp, dtype=torch.float32).clamp(max=0.0),
            response_mask=torch.ones_like(ids_T, dtype=torch.bool),
            finish_reason=_reason(choice["finish_reason"]),
            weight_version=self.version,
            text=self.policy.decode(ids_T),
            turns=(Turn(given, len(ids_T)),),
            demo_mask=torch.arange(len(ids_T)) < given if given else None,
        )

    # -- weights -----------------------------------------------------------------------------------------------------

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give all servers the policy's weights; rank 0 sends, the others read the stream along, and all wait.

        A sync that fails leaves a mixture of two policies, and a server that is paused; nothing is sampled until one
        is complete.

        Raises:
            ServerError: A server is dead, hung, or cannot take weights; says how to start it.
        """
        self.version = -1
        stream, stamp, failure = iter(named_tensors), secrets.randbits(48) + 1, None
        try:
            self._everywhere(self._look)
            if rank() == 0:
                self._push(stream, version, _label(version, stamp))
        except ServerError as error:
            failure = error
        for _ in stream:  # gathering a sharded tensor takes all ranks, also those that send nothing
            pass
        mine = [failure is not None, 0 if rank() else stamp]
        failed, stamp = max_over_ranks(torch.tensor(mine, device=self.policy.device)).tolist()
        if failed:
            raise failure or ServerError(f"another rank could not give the servers the weights of update {version}")
        self.version, self._label = version, _label(version, stamp)

    async def _look(self, server: Server) -> None:
        if not server.context_tokens:
            server.context_tokens = await routes.look(server, self.model)
            if rank() == 0:
                await routes.prepare(server)

    def _push(self, stream: Iterator[tuple[str, Tensor]], version: int, label: str) -> None:
        purpose = f"the weights of update {version}"
        self._everywhere(lambda server: routes.begin(server, purpose))
        for bucket in buckets(stream):
            content = json.dumps({"update_info": {"weights": to_text(bucket)}}).encode()
            self._everywhere(partial(routes.update, purpose=purpose, content=content))
        self._everywhere(lambda server: routes.finish(server, purpose, label))
        if not self._probed:
            self._everywhere(lambda server: routes.probe(server, self.policy.stop_ids[0]))
            self._probed = True

    def reset_caches(self) -> None:
        """Drop cached prefixes and encoded images, which would silently be those of the old weights."""
        self._everywhere(lambda server: routes.reset_caches(server, "the reset of its caches"))

    # -- life --------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """The servers' memory is their own."""

    def wake(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Leave the servers as they are; idempotent."""
        if self._loop is not None:
            self._loop.run(self._client.aclose())
            self._loop.close()
            self._loop, self.version = None, -1

    def _everywhere(self, action: Callable[[Server], Coroutine[object, object, object]]) -> None:
        """The same on all servers at once."""

        async def act() -> None:
            await under_watch(self.servers, [action(server) for server in self.servers])

        self._loop.run(act())


def image_parts(images: Sequence[Image]) -> list[Json]:
    """Decoded images as the server takes them: ``{"type": "image_url", "url": "data:image/png;base64,..."}`` each."""
    parts: list[Json] = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)  # lossless, and quick
        parts.append(
            {"type": "image_url", "url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
        )
    return parts


def _label(version: int, stamp: int) -> str:
    return f"{version}-{stamp:x}"


def _reason(name: Json) -> Literal["stop", "length", "abort"]:
    return "stop" if name == "stop" else "length" if name == "length" else "abort"
