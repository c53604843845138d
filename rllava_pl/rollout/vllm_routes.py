"""The routes of a vLLM server, one function each: what it serves, its weights, samples.

Weights take the routes of development mode: pause, start, buckets, finish, empty the caches, resume. Those that change
weights are sent once and never retried, because a server that got one and could not answer would get it twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rllava_pl.rollout.common import BAN
from rllava_pl.rollout.vllm_http import Server, ServerError
from rllava_pl.rollout.vllm_transfer import BACKEND

START = (
    "Start it with: VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 "
    "--enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm "
    f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\', in an environment that has rllava-pl'
)
NO_DEV_MODE = {404: f"It takes no weights, because it does not run in development mode. {START}"}
NO_BACKEND = {500: f"It has no weight transfer {BACKEND!r}. {START}"}
NO_TOKENS = {403: f"It takes text only, no token ids. {START}", 404: START}


async def generate(server: Server, purpose: str, body: Mapping[str, object]) -> Mapping[str, Any]:
    """Samples: token ids in, token ids out."""
    return await server.post("/inference/v1/generate", purpose, body, NO_TOKENS, repeatable=True)


async def look(server: Server, model: str) -> int:
    """Context of the server, in tokens, after a check that it takes weights and serves ``model``, if that is given."""
    await server.get("/weight_info", "the query of its weights", hints=NO_DEV_MODE)
    answer = await server.get("/v1/models", "the query of its models")
    lengths = {str(served["id"]): int(served["max_model_len"]) for served in answer["data"]}
    if model and model not in lengths:
        raise ServerError(f"vLLM server {server.url} has no model {model!r}; it serves {sorted(lengths)}")
    return lengths[model] if model else next(iter(lengths.values()))


async def prepare(server: Server) -> None:
    """Load the weight transfer."""
    await server.post("/init_weight_transfer_engine", "its weight transfer", {"init_info": {}}, NO_BACKEND)


async def begin(server: Server, purpose: str) -> None:
    """Open an update: running requests end, further ones wait.

    A server that is paused already may hold half the weights of an interrupted update. Ending that update makes the
    server usable; sampling, or adding to the half, would crash it. A server that has closed the update itself needs
    another to end; any other refuses to start it.
    """
    interrupted = (await server.get("/is_paused", purpose))["is_paused"]
    await server.post("/pause?mode=wait", purpose)
    if interrupted:
        with suppress(ServerError):
            await server.post("/start_weight_update", purpose)
        await server.post("/finish_weight_update", purpose, {})
    await server.post("/start_weight_update", purpose)


async def update(server: Server, purpose: str, content: bytes) -> None:
    """Send one bucket: JSON ``{"update_info": {"weights": ...}}``."""
    await server.post("/update_weights", purpose, content)


async def finish(server: Server, purpose: str, label: str) -> None:
    """Close the update, empty the caches and serve again."""
    await server.post("/finish_weight_update", purpose, {"weight_version": label})
    await reset_caches(server, purpose)
    await server.post("/resume", purpose)
    if (found := (await server.get("/weight_info", purpose))["weight_version"]) != label:
        raise ServerError(f"vLLM server {server.url} was given the weights {label!r} and reports {found!r}")


async def reset_caches(server: Server, purpose: str) -> None:
    """Drop cached prefixes and encoded images."""
    if not (await server.post("/reset_prefix_cache", purpose))["success"]:
        raise ServerError(f"vLLM server {server.url} did not reset its prefix cache at {purpose}: requests are running")
    await server.post("/reset_encoder_cache", purpose)


async def probe(server: Server, prompt_token: int) -> None:
    """Check that log-probs are those after temperature and bans.

    Two tokens are forced in turn behind ``prompt_token``, any token of the vocabulary. After the bias each has
    probability 1; before it, both cannot have more than 1/2.
    """
    for token in (0, 1):
        sampling = {"max_tokens": 1, "logprobs": 0, "logit_bias": {str(token): -BAN}, "detokenize": False}
        body = {"token_ids": [prompt_token], "sampling_params": sampling}
        (choice,) = (await generate(server, "a probe of its log-probs", body))["choices"]
        if not -0.5 < choice["logprobs"]["content"][0]["logprob"] <= 1e-3:
            raise ServerError(
                f"vLLM server {server.url} gives log-probs before temperature and bans, not those of what it samples "
                f"from. {START}"
            )
