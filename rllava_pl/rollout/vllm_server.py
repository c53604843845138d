"""Rollouts from vLLM servers that were started outside of the run: token ids in, token ids out, weights over HTTP.

A request carries the prompt's ids with one placeholder an image, and the images themselves as PNG, never an address to
fetch them from. The answer carries the prompt's ids as the server expanded them, the sampled ids, their log-probs, and
the label of the weights that sampled each of them. A label names one sync of one run, so an answer from a server that
restarted meanwhile, or that got weights from another run, is refused.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, cycle
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks, rank
from rllava_pl.models.policy import Policy
from rllava_pl.rollout import vllm_http as http
from rllava_pl.rollout import vllm_routes as routes
from rllava_pl.rollout.common import VLLMBase
from rllava_pl.rollout.vllm_http import Server, ServerError
from rllava_pl.rollout.vllm_transfer import buckets, to_text
from rllava_pl.types import Generation, Request, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image


class VLLMServerEngine(VLLMBase):
    """Samples with one or several vLLM servers, which receive the policy's weights.

    Options are those of ``VLLMServerRollout``; ``policy`` is the trained one, with its tokenizer and action space.
    """

    context_option = "--max-model-len of the servers"

    def __init__(
        self,
        urls: Sequence[str],
        policy: Policy,
        *,
        model: str = "",
        images: int = 4,
        concurrency: int = 64,
        limits: http.RequestLimits = http.RequestLimits(),  # noqa: B008  frozen
        allow_remote: bool = False,
    ) -> None:
        http.require_client()
        for url in urls:
            http.check_host(http.base_url(url), allow_remote=allow_remote)
        super().__init__(policy)
        self.model = model
        self.images = images
        self._label = ""
        self._probed = False
        self._client = http.new_client(limits)
        self.servers = [Server(http.base_url(url), self._client, limits, concurrency=concurrency) for url in urls]
        first = rank() % len(urls)  # ranks begin with different servers
        self._next_server = cycle(self.servers[first:] + self.servers[:first])
        self._loop: http.EventLoop | None = http.EventLoop()

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Complete every request once a seed; see ``BatchEngine``.

        Raises:
            ServerError: A server is dead, hangs, refuses a request or answers with other weights; names the prompt.
        """
        if not requests:
            return []
        handles = accumulate((len(request.seeds) for request in requests[:-1]), initial=0)
        work = [self._exchange(*pair, sampling) for pair in zip(requests, handles, strict=True)]
        answers = self._loop.run(http.run_while_healthy(self.servers, work, sampling=True))
        return [generation for answer in answers for generation in answer]

    def _exchange(
        self, request: Request, handle: int, sampling: Sampling
    ) -> Coroutine[object, object, list[Generation]]:
        """A request to the next server; the tokenizer is used here, in the caller's thread."""
        server, images = next(self._next_server), request.prompt.images
        purpose = f"the {len(request.seeds)} samples of prompt {request.prompt.uid!r}"
        body: dict[str, object] = {
            "token_ids": self.prompt_ids(request),
            "return_token_ids": True,
            "sampling_params": self.parameters(request, sampling),
            **({"model": self.model} if self.model else {}),
        }

        async def exchange() -> list[Generation]:
            async with server.slots:
                if images:
                    body["content_parts"] = await asyncio.to_thread(image_parts, images)
                answer = await routes.generate(server, purpose, body)
            try:
                samples = [self._checked(choice) for choice in sorted(answer["choices"], key=itemgetter("index"))]
                if len(samples) not in (1, len(request.seeds)):
                    raise ValueError(f"{len(request.seeds)} samples were requested and {len(samples)} came")
                return self.generations(request, handle, answer["prompt_token_ids"], samples)
            except (KeyError, TypeError, ValueError) as error:
                raise ServerError(f"vLLM server {server.url} at {purpose}: {error}") from error

        return exchange()

    def _checked(self, choice: Mapping[str, Any]) -> tuple[list[int], list[float], str | None]:
        """Ids, log-probs and finish reason of a sample with these weights; a malformed one raises as well."""
        ids, tokens = choice["token_ids"], choice["logprobs"]["content"]
        if [token["token_id"] for token in tokens] != ids:
            raise ValueError("the log-probs are of other tokens than those that were sampled")
        labels = {span["version"] for span in choice["weight_versions"] or []}
        if ids and labels != {self._label}:
            raise ValueError(
                f"the answer was sampled with the weights {sorted(labels)}, not with {self._label!r}; the server was "
                "restarted, or another run gives it weights"
            )
        return ids, [token["logprob"] for token in tokens], choice["finish_reason"]

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give all servers the policy's weights; rank 0 sends, the others iterate the stream with it, and all wait.

        A sync that fails leaves a mixture of two policies, and a server that is paused; nothing is sampled until one
        is complete.

        Raises:
            ServerError: A server is dead, hangs, or cannot take weights; says how to start it.
        """
        self.version = -1
        stream, stamp, failure = iter(named_tensors), secrets.randbits(48) + 1, None
        try:
            self._on_all(self._look)
            self.context_tokens = min(server.context_tokens for server in self.servers)
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
        self._on_all(lambda server: routes.begin(server, purpose))
        for bucket in buckets(stream):
            content = json.dumps({"update_info": {"weights": to_text(bucket)}}).encode()
            self._on_all(partial(routes.update, purpose=purpose, content=content))
        self._on_all(lambda server: routes.finish(server, purpose, label))
        if not self._probed:
            self._on_all(lambda server: routes.probe(server, self.policy.stop_ids[0]))
            self._probed = True

    def reset_caches(self) -> None:
        """Drop cached prefixes and encoded images, which were computed with the old weights."""
        self._on_all(lambda server: routes.reset_caches(server, "the reset of its caches"))

    def _on_all(self, action: Callable[[Server], Coroutine[object, object, object]]) -> None:
        """Run the same action on all servers at once."""
        self._loop.run(http.run_while_healthy(self.servers, [action(server) for server in self.servers]))

    def close(self) -> None:
        """Close the client; the servers keep running. Idempotent."""
        if self._loop is not None:
            self._loop.run(self._client.aclose())
            self._loop.close()
            self._loop, self.version = None, -1


def image_parts(images: Sequence[Image]) -> list[dict[str, str]]:
    """Decoded images as the server takes them: ``{"type": "image_url", "url": "data:image/png;base64,..."}`` each."""
    parts = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)  # lossless, and quick
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "url": f"data:image/png;base64,{data}"})
    return parts


def _label(version: int, stamp: int) -> str:
    return f"{version}-{stamp:x}"
