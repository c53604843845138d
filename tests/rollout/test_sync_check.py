"""The sync check against an engine with a copy of the weights, of which a test can lose some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import hf_weights
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.sync_check import (
    FULL_PRECISION,
    IMAGE_PROBE,
    LONG,
    TEXT,
    Gap,
    GapLimit,
    SyncCheck,
    SyncCheckError,
    likely_cause,
    probes,
)
from rllava_pl.rollout.transformers import TransformersEngine
from rllava_pl.types import Sampling


class Copy(TransformersEngine):
    """Samples from a copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.lost = lambda name: False
        self.syncs = 0

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.syncs += 1
        own = self.policy.model.state_dict()
        for name, tensor in named_tensors:
            if not self.lost(name):
                own[name].copy_(tensor)
        self.version = version


class Run:
    def __init__(self, load: Callable[..., Policy], family: str = "idefics3", **options: object) -> None:
        self.policy, self.engine, self.version = load(family), Copy(load(family)), 0
        settings = {"limit": FULL_PRECISION, "every": 1, "context_tokens": 512, "images": 1}
        self.check = SyncCheck(self.policy, **(settings | options))
        self.managed = ManagedEngine(
            build=lambda: self.engine,
            policy=self.policy,
            weights=lambda: hf_weights(self.policy.model),
            version=lambda: self.version,
            after_sync=self.check,
        )

    def step(self, *changed: str) -> None:
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                if any(part in name for part in changed):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        self.version += 1
        self.managed.generate(self.check.requests[:1], Sampling(max_tokens=1))


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_complete_syncs_pass(load: Callable[..., Policy], family: str) -> None:
    run = Run(load, family)
    for _ in range(3):
        run.step("")
    assert run.engine.syncs == run.check.syncs == 3


@pytest.mark.parametrize(
    ("lost", "cause"),
    [
        ("vision_model", "vision tower, connector or encoder cache: only prompts with images differ"),
        ("text_model.layers", "language layers, head"),
    ],
)
def test_weights_that_do_not_arrive_stop_the_run_with_the_likely_cause(
    load: Callable[..., Policy], lost: str, cause: str
) -> None:
    run = Run(load)
    run.step("")
    run.engine.lost = lambda name: lost in name
    with pytest.raises(SyncCheckError, match=rf"by more than max 0\.001 and mean 0\.0001 nats: a text: .*{cause}"):
        run.step(lost)


def test_measures_after_the_first_sync_and_every_nth(load: Callable[..., Policy]) -> None:
    run = Run(load, every=3)
    measured = []
    run.check.check = lambda managed: measured.append(run.check.syncs)
    for _ in range(7):
        run.step("")
    assert measured == [1, 4, 7]
    with pytest.raises(ValueError, match="sync check: every is 0; use at least 1"):
        Run(load, every=0)


def test_recovery_pushes_all_weights_again_before_it_gives_up(
    load: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(load, recover=True)
    run.step("")
    run.engine.lost = lambda name: "vision_model" in name and run.engine.syncs == 2
    run.step("vision_model")
    assert run.engine.syncs == 3 and "all weights are pushed again" in caplog.text
    run.engine.lost = lambda name: "vision_model" in name
    with pytest.raises(SyncCheckError):
        run.step("vision_model")


def test_recovery_tries_a_safer_memory_mode_last(load: Callable[..., Policy], caplog: pytest.LogCaptureFixture) -> None:
    run = Run(load, recover=True)
    run.step("")
    safer = []
    run.engine.lost = lambda name: "vision_model" in name and not safer
    run.engine.fall_back = lambda: safer.append(True) or True
    run.step("vision_model")
    assert safer and "the engine uses memory mode 'sleep' from now on" in caplog.text


def test_probes_are_those_that_fit_the_engine(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    every = probes(policy, context_tokens=512, images=3)
    assert [r.prompt.uid for r in every] == [TEXT, IMAGE_PROBE, LONG]
    assert [len(r.prompt.images) for r in every] == [0, 1, 2] and len(every[-1].inputs) > 128
    assert [r.prompt.uid for r in probes(policy, context_tokens=128, images=3)] == [TEXT, IMAGE_PROBE]
    assert not any(r.prompt.images for r in probes(policy, context_tokens=512, images=0))
    assert probes(policy, context_tokens=512, images=3)[1].seeds == every[1].seeds
    with pytest.raises(ValueError, match="the shortest probe exceeds the engine's context of 8 tokens"):
        probes(policy, context_tokens=8, images=1)


PATTERNS = {
    "prefix cache": (1e-6, 1e-6, 0.5),
    "vision tower, connector or encoder cache": (1e-6, 2e-4, 0.5),
    "language layers, head": (0.2, 0.2, 0.5),
}


@pytest.mark.parametrize(("cause", "largest"), PATTERNS.items(), ids=PATTERNS.keys())
def test_pattern_of_gaps_gives_the_likely_cause(cause: str, largest: tuple[float, ...]) -> None:
    gaps = [Gap(probe, x, x / 10) for probe, x in zip((TEXT, IMAGE_PROBE, LONG), largest, strict=True)]
    assert likely_cause(gaps, FULL_PRECISION).startswith(cause)


def test_limit_is_exceeded_by_a_gap_that_is_not_a_number() -> None:
    assert GapLimit(1.0, 1.0).exceeded_by(Gap(TEXT, float("nan"), 0.0))
    assert not GapLimit(float("inf"), 0.05).exceeded_by(Gap(TEXT, 3.0, 0.04))
