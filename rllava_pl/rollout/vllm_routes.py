"""What is asked of a vLLM server, route by route: its kind, its weights, samples.

Weights take the routes of development mode: pause, start, buckets, finish, clear the caches, resume. Those that change
weights are sent once and never again, because a server that got one and could not answer would get it twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import cast

from rllava_pl.rollout.vllm_http import Json, Server, ServerError
from rllava_pl.rollout.vllm_transfer import BACKEND

BAN = -100.0
"""Logit bias of tokens that are never sampled; vLLM allows no lower one, and e^-100 never happens."""
START = (
    "Start it with: VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 "
    "--enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm "
    f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\', in an environment that has rllava-pl'
)
NO_DEV_MODE = {404: f"It takes no weights, because it does not run in development mode. {START}"}
NO_BACKEND = {500: f"It does not know the weight transfer {BACKEND!r}. {START}"}
NO_TOKENS = {403: f"It takes text only, no token ids. {START}", 404: START}


async def generate(server: Server, purpose: str, body: Mapping[str, Json]) -> Mapping[str, Json]:
    """Samples: token ids in, token ids out."""
    return await server.post("/inference/v1/generate", purpose, body, NO_TOKENS, repeatable=True)


async def look(server: Server, model: str) -> int:
    """See whether it is a server of the needed kind.

    Args:
        server: Any.
        model: Name it must serve; empty for whatever it serves.

    Returns:
        Its context: longest prompt and response together, in tokens.
    """
    await server.get("/weight_info", "the question for its weights", NO_DEV_MODE)
    answer = await server.get("/v1/models", "the question for its models")
    lengths = {str(m["id"]): m["max_model_len"] for m in cast("list[dict[str, Json]]", answer["data"])}
    if model and model not in lengths:
        raise ServerError(f"vLLM server {server.url} has no model {model!r}; it serves {sorted(lengths)}")
    return int(cast(int, lengths[model] if model else next(iter(lengths.values()))))


async def prepare(server: Server) -> None:
    """Have it load the weight transfer."""
    await server.post("/init_weight_transfer_engine", "its weight transfer", {"init_info": {}}, NO_BACKEND)


async def begin(server: Server, purpose: str) -> None:
    """Let running requests end, keep others waiting, and open an update."""
    interrupted = (await server.get("/is_paused", purpose))["is_paused"]
    await server.post("/pause?mode=wait", purpose)
    if interrupted:
        await _end_interrupted(server, purpose)
    await server.post("/start_weight_update", purpose)


async def _end_interrupted(server: Server, purpose: str) -> None:
    """An update that broke off has left layers with half of their weights; ending one frees them for the next.

    Where the server has noticed the break it has no open update and needs one to end, else it refuses a second.
    Sampling now, or adding to the halves, would crash it.
    """
    with suppress(ServerError):
        await server.post("/start_weight_update", purpose)
    await server.post("/finish_weight_update", purpose, {})


async def update(server: Server, purpose: str, content: bytes) -> None:
    """Hand over one bucket: JSON ``{"update_info": {"weights": ...}}``."""
    await server.post("/update_weights", purpose, content)


async def finish(server: Server, purpose: str, label: str) -> None:
    """Close the update and forget everything computed with the old weights; it serves again afterwards."""
    await server.post("/finish_weight_update", purpose, {"weight_version": label})
    await reset_caches(server, purpose)
    await server.post("/resume", purpose)
    if (found := (await server.get("/weight_info", purpose))["weight_version"]) != label:
        raise ServerError(f"vLLM server {server.url} was given the weights {label!r} and reports {found!r}")


async def reset_caches(server: Server, purpose: str) -> None:
    """Forget cached prefixes and encoded images."""
    if not (await server.post("/reset_prefix_cache", purpose))["success"]:
        raise ServerError(f"vLLM server {server.url} did not reset its prefix cache at {purpose}: requests are running")
    await server.post("/reset_encoder_cache", purpose)


async def probe(server: Server, prompt_token: int) -> None:
    """See whether its log-probs are those after temperature and bans.

    Two tokens are forced in turn. After the force each has probability 1; before, both cannot have more than 1/2.

    Args:
        server: With the policy's weights.
        prompt_token: Any token of the vocabulary.
    """
    for token in (0, 1):
        sampling: dict[str, Json] = {
            "max_tokens": 1,
            "logprobs": 0,
            "logit_bias": {str(token): -BAN},
            "detokenize": False,
        }
        body: dict[str, Json] = {"token_ids": [prompt_token], "sampling_params": sampling}
        answer = await generate(server, "a probe of its log-probs", body)
        (choice,) = cast("list[dict[str, dict[str, list[dict[str, float]]]]]", answer["choices"])
        if not -0.5 < choice["logprobs"]["content"][0]["logprob"] <= 1e-3:
            raise ServerError(
                f"vLLM server {server.url} gives log-probs before temperature and bans, not those of what it samples "
                f"from. {START}"
            )
