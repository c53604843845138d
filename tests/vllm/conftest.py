"""Real engines, one at a time in this process, each shared by the tests of a file.

Without vLLM these tests are skipped with the reason; with RLLAVA_PL_REQUIRE_VLLM set that is an error, so that a run
which is meant to include them cannot pass without them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rllava_pl.functional.seeds import seed_from
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import LoRA, hf_weights
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_adapter import adapter_options
from rllava_pl.rollout.vllm_build import build_llm
from rllava_pl.types import PolicyBatch, Prompt, Request, Rollout, Sampling
from tests import runs
from tests.models.conftest import prompts

if os.environ.get("RLLAVA_PL_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None:
    raise pytest.UsageError("RLLAVA_PL_REQUIRE_VLLM is set, but vLLM is not installed: these tests must not be skipped")

GROUP = 3
LONG = " Look at it once more, and then again."


@dataclass
class Bench:
    """A policy and an engine with its weights."""

    policy: Policy
    engine: VLLMEngine

    def sync(self) -> None:
        self.engine.sync(hf_weights(self.policy.model), self.engine.version + 1)

    def requests(self, batch: Sequence[Prompt], *, samples: int = GROUP, stream: str = "test") -> list[Request]:
        inputs = self.policy.encode(batch)
        seeds = [tuple(seed_from(1, stream, p, k) for k in range(samples)) for p in range(len(batch))]
        return [Request(q, x, p, seeds[p]) for p, (q, x) in enumerate(zip(batch, inputs, strict=True))]

    def mixed(self, *, samples: int = GROUP, stream: str = "test") -> list[Request]:
        """0 to 3 pictures a prompt, and one prompt of more than a cache block of 128 tokens."""
        short = prompts([0, 1, 2, 3])
        first = short[1].messages[0]
        long = Prompt("test:long", (type(first)("user", (*first.parts, LONG * 6)),), short[1].images)
        batch = self.requests([*short, long], samples=samples, stream=stream)
        assert len(batch[-1].inputs) > 128
        return batch

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        return run_episodes(self.engine, self.policy, requests, sampling)

    def gap(self, requests: Sequence[Request], temperature: float = 1.0) -> tuple[float, float]:
        """Largest and mean |log-prob of the engine - of the trainer| of new samples."""
        self.policy.temperature = temperature
        return gap(self.policy, self.generate(requests, Sampling(max_tokens=8, temperature=temperature)))


def gap(policy: Policy, rollouts: Sequence[Rollout], samples: int = GROUP) -> tuple[float, float]:
    ids, trained, sampled, logp = (
        pad_sequence([getattr(r, name) for r in rollouts], batch_first=True)
        for name in ("response_ids", "trained_mask", "sampled_mask", "engine_logprobs")
    )
    with torch.no_grad():
        scored = policy(PolicyBatch(tuple(r.inputs for r in rollouts[::samples]), samples, ids, trained)).logp_NT
    difference = (scored - logp)[sampled].abs()
    return float(difference.max()), float(difference.mean())


def build(path: str, **options: object) -> VLLMEngine:
    """An engine for tests: fp32, 64 MiB of cache, a context of 512 tokens, three pictures a prompt."""
    settings = {"dtype": "float32", "context_tokens": 512, "images": 3, "kv_cache_gib": 1 / 16, "memory": "resident"}
    return build_llm(path, **(settings | {"enforce_eager": True, "seed": 0} | options))


def perturb(policy: Policy, only: str = "", scale: float = 0.02) -> None:
    """Change the trained weights whose name contains ``only``, as an update would."""
    generator = torch.Generator().manual_seed(0)
    changed = 0
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if only in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
                changed += 1
    assert changed, f"no parameter has {only} in its name"


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """By name of a family; ``adapter`` is idefics3 with LoRA, of which the adapters alone are pushed."""
    adapter = request.param == "adapter"
    source = runs.tiny("idefics3", lora=LoRA(r=4, alpha=8)) if adapter else runs.tiny(request.param)
    source.prepare(1)
    policy = source.load()
    llm = build(source.path, **(adapter_options(policy) if adapter else {}))
    engine = VLLMEngine(llm, policy, adapter=adapter)
    bench = Bench(policy, engine)
    bench.sync()
    yield bench
    engine.close()


@pytest.fixture
def fresh(bench: Bench) -> Iterator[Bench]:
    """The shared engine; afterwards its policy's weights are as before, and pushed."""
    before = {name: x.clone() for name, x in bench.policy.state_dict().items()}
    yield bench
    bench.policy.load_state_dict(before)
    bench.policy.temperature = 1.0
    bench.sync()


On = Callable[..., pytest.MarkDecorator]


def on(*families: str) -> pytest.MarkDecorator:
    """Run a test with these engines."""
    return pytest.mark.parametrize("bench", families, indirect=True, scope="module")
