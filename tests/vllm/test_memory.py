"""Order of the calls that free memory and restore it; vLLM has them on GPUs only, so they are recorded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rllava_pl.models.policy import Policy
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_build import memory_mode
from rllava_pl.types import Sampling
from tests.models.conftest import load, prompts, tiny_path  # noqa: F401  # fixtures
from tests.rollout.test_transformers import requests

pytestmark = pytest.mark.vllm


class Recorder:
    """In place of vLLM: records its calls and answers every prompt with one token."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.model_config = SimpleNamespace(max_model_len=512, multimodal_config=None)
        self.llm_engine = SimpleNamespace(
            reset_encoder_cache=lambda: self.events.append("reset encoder"),
            engine_core=SimpleNamespace(engine_core=None, shutdown=lambda: self.events.append("shutdown")),
        )

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def call(*args: object, **options: object) -> bool:
            shown = next(iter(options.values()), "")
            self.events.append(f"{name} {shown}".strip())
            return True

        return call

    def get_world_size(self) -> int:
        return 1

    def generate(self, texts: list[dict[str, list[int]]], *_: object, **__: object) -> list[SimpleNamespace]:
        self.events.append("generate")
        chosen = SimpleNamespace(token_ids=[20], logprobs=[{20: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        return [SimpleNamespace(outputs=[chosen], prompt_token_ids=text["prompt_token_ids"]) for text in texts]


SYNC = ["start_weight_update", "update_weights", "finish_weight_update", "reset encoder", "reset_prefix_cache"]
PASSES = {
    "resident": ([], [], []),
    "release_kv": ([], ["wake_up ['kv_cache']", "reset_mm_cache"], ["sleep 0", "release_kv_cache_memory"]),
    "sleep": (["wake_up ['weights']"], ["wake_up ['kv_cache']", "reset_mm_cache"], ["sleep 1"]),
    "discard": (["wake_up ['weights']"], ["wake_up ['kv_cache']", "reset_mm_cache"], ["sleep 2"]),
}


@pytest.mark.parametrize("memory", PASSES)
def test_weights_wake_before_a_sync_and_the_cache_after_it(load: Callable[..., Policy], memory: str) -> None:  # noqa: F811
    policy, llm = load("idefics3"), Recorder()
    engine = VLLMEngine(llm, policy, memory=memory)
    asked, weights = requests(policy, prompts([0]), samples=1), [("lm_head.weight", torch.zeros(1))]
    engine.sync(weights, 1)
    run_episodes(engine, policy, asked, Sampling(max_tokens=1))
    engine.sleep()
    llm.events.clear()
    engine.wake()
    engine.sync(weights, 2)
    run_episodes(engine, policy, asked, Sampling(max_tokens=1))
    engine.sleep()
    engine.sleep()
    first, between, last = PASSES[memory]
    assert llm.events == [*first, *SYNC, *between, "generate", *last]
    assert engine.version == (-1 if memory == "discard" else 2)
    engine.close()
    engine.close()
    assert llm.events[-1] == "shutdown" and llm.events.count("shutdown") == 1


def test_sampling_from_discarded_weights_is_refused(load: Callable[..., Policy]) -> None:  # noqa: F811
    policy = load("idefics3")
    engine = VLLMEngine(Recorder(), policy, memory="discard")
    engine.sync([("lm_head.weight", torch.zeros(1))], 1)
    engine.sleep()
    engine.wake()
    with pytest.raises(RuntimeError, match="there was no complete sync"):
        engine.start(requests(policy, prompts([0]), samples=1), Sampling(max_tokens=1))


def test_memory_modes_that_free_memory_need_a_gpu() -> None:
    assert memory_mode("auto") == memory_mode("resident") == "resident"
    with pytest.raises(ValueError, match="memory 'sleep' frees GPU memory, and vLLM runs on the CPU here"):
        memory_mode("sleep")
