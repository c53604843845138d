"""The sync check on the real engine: a complete sync passes, and every silent fault of a sync is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import LoRA, hf_weights
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.sync_check import FULL_PRECISION, SyncCheck, SyncCheckError
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.types import Sampling
from tests import runs
from tests.vllm.conftest import Bench, on, perturb

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
Weights = Iterable[tuple[str, torch.Tensor]]


class Run:
    """A policy that is updated, its engine, and a check after every sync."""

    def __init__(self, policy: Policy, engine: VLLMEngine, **options: object) -> None:
        self.policy, self.engine = policy, engine
        self.version = engine.version
        self.stream: Callable[[Weights], Weights] = lambda weights: weights
        settings = {"limit": FULL_PRECISION, "every": 1, "context_tokens": 512, "images": 3}
        self.check = SyncCheck(policy, **(settings | options))
        self.managed = ManagedEngine(
            build=lambda: engine,
            policy=policy,
            weights=lambda: self.stream(hf_weights(policy.model)),
            version=lambda: self.version,
            after_sync=self.check,
        )

    def step(self) -> None:
        """One pass: the version rises, so the engine is synchronised and checked."""
        self.version += 1
        self.managed.generate(self.check.requests[:1], Sampling(max_tokens=2))

    def lose(self, *parts: str) -> None:
        """From now on the stream has the present weights for names that contain one of ``parts``."""
        kept = {name: x.clone() for name, x in hf_weights(self.policy.model) if any(part in name for part in parts)}
        assert kept
        self.stream = lambda weights: ((name, kept.get(name, x)) for name, x in weights)


@pytest.fixture
def run(fresh: Bench) -> Run:
    run = Run(fresh.policy, fresh.engine)
    run.step()
    return run


@on("idefics3", "qwen2_5_vl", "qwen3_vl")
def test_complete_sync_passes(run: Run) -> None:
    for _ in range(3):
        perturb(run.policy)
        run.step()
    assert run.check.syncs == 4


@on("idefics3", "qwen2_5_vl", "qwen3_vl")
def test_missing_vision_tower_is_found(run: Run) -> None:
    vision = "visual" if "qwen" in run.policy.model.config.model_type else "vision_model"
    run.lose(vision)
    perturb(run.policy, vision)
    with pytest.raises(SyncCheckError, match="Likely cause: vision tower, connector or encoder"):
        run.step()


@on("idefics3", "qwen2_5_vl")
def test_missing_head_is_found(run: Run) -> None:
    run.lose("lm_head")
    perturb(run.policy, "embed_tokens")
    with pytest.raises(
        SyncCheckError, match=r"Likely cause: language layers, head \(lm_head.weight is pushed also when"
    ):
        run.step()


@on("idefics3")
def test_single_missing_adapter_is_found(fresh: Bench) -> None:
    source = runs.tiny("idefics3", lora=LoRA(r=4, alpha=8))
    source.prepare(1)
    run = Run(source.load(), VLLMEngine(fresh.engine.llm, fresh.policy))
    run.step()
    name = "layers.1.mlp.down_proj"
    run.lose(name)
    perturb(run.policy, f"{name}.lora_B", scale=0.1)
    with pytest.raises(SyncCheckError, match=r"Likely cause: language layers, head .* or adapters did not arrive"):
        run.step()


@on("idefics3", "qwen2_5_vl")
def test_stale_prefix_cache_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.engine.llm, "reset_prefix_cache", lambda: True)
    perturb(run.policy)
    with pytest.raises(SyncCheckError, match="Likely cause: prefix cache: only prompts longer than a block differ"):
        run.step()


@on("idefics3", "qwen2_5_vl")
def test_stale_encoder_cache_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.engine.llm.llm_engine, "reset_encoder_cache", lambda: None)
    perturb(run.policy)
    with pytest.raises(SyncCheckError, match="Likely cause: vision tower, connector or encoder cache"):
        run.step()


@on("idefics3")
def test_caches_that_were_not_emptied_once_are_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = run.engine.reset_caches, []
    monkeypatch.setattr(run.engine, "reset_caches", lambda: calls.append(1) or (len(calls) > 1 and real()))
    perturb(run.policy)
    with pytest.raises(SyncCheckError, match="Likely cause: caches: without them the gap is gone"):
        run.step()


@on("idefics3")
def test_recovery_pushes_all_weights_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run.check.recover = True
    perturb(run.policy)
    first = iter([True])

    def lossy(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        lost = next(first, False)
        return ((name, torch.zeros_like(x) if lost and "connector" in name else x) for name, x in weights)

    run.stream = lossy
    run.step()
    assert "engine and trainer differ" in caplog.text and "all weights are pushed again" in caplog.text
    run.lose("connector")
    perturb(run.policy, "connector")
    with pytest.raises(SyncCheckError, match=r"by more than max 0\.001 and mean 0\.0001 nats"):
        run.step()
