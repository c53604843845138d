"""Clip-Cov and KL-Cov choose tokens over the whole mini-batch, whatever it is split into."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.loop.options import Batching
from rllava_pl.modules import ClipCov, KLCov, RLModule
from rllava_pl.types import PolicyOutput, TrainingBatch
from tests.modules.passes import fitted, gradient, one_pass, prompts, recording_updater, scored_pass, with_selection

Place = tuple[str, tuple[int, ...], int]


@pytest.fixture(
    scope="module",
    params=[(ClipCov, {"ratio": 0.1, "lower": 0.0, "upper": 100.0}), (KLCov, {"ratio": 0.1})],
    ids=["ClipCov", "KLCov"],
)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    algorithm, options = request.param
    return fitted(tmp_path_factory.mktemp("run"), algorithm, **options)


def selected(module: RLModule, batch: TrainingBatch, size: int = 0) -> list[Place]:
    """Prompt, response and position of each token that the loss of an update saw as selected."""
    parts: list[TrainingBatch] = []

    def losses(output: PolicyOutput, part: TrainingBatch) -> dict[str, torch.Tensor]:
        parts.append(part)
        return module.losses(output, part)

    updater, _ = recording_updater(module, Batching(micro_batch_size=size))
    assert updater.step(with_selection(module, batch), module.terms, losses)
    return sorted(
        (part.rollouts[n].prompt.uid, tuple(part.rollouts[n].response_ids.tolist()), t)
        for part in parts
        for n, t in part.selected_NT.nonzero().tolist()
    )


def test_selection_does_not_depend_on_micro_batches_and_order(module: RLModule) -> None:
    batch = one_pass(module, prompts(type(module)))
    tokens = int(batch.trained_mask_NT.sum())
    chosen = selected(module, batch)
    assert len(chosen) == int(0.1 * tokens) > 8
    for size in (1, 2, 3, 4, 8):
        assert selected(module, batch, size) == chosen
    assert selected(module, batch.select([5, 3, 1, 0, 2, 4])) == chosen


def test_small_ratio_takes_one_token_of_the_minibatch_and_not_of_each_micro_batch(module: RLModule) -> None:
    batch = one_pass(module, prompts(type(module)))
    ratio, module.ratio = module.ratio, 1e-9
    assert len(selected(module, batch, 1)) == 1
    module.ratio = ratio


def test_selection_of_clip_cov_depends_on_the_update(tmp_path_factory: pytest.TempPathFactory) -> None:
    module = fitted(tmp_path_factory.mktemp("run"), ClipCov, ratio=0.05, lower=0.0, upper=100.0)
    batch = one_pass(module, prompts(ClipCov))
    first = selected(module, batch)
    assert selected(module, batch) == first
    module.state.updates += 1
    assert selected(module, batch) != first


def test_penalty_of_kl_cov_begins_when_the_policy_has_moved(tmp_path_factory: pytest.TempPathFactory) -> None:
    """At π = π_old the penalty |log ρ| is the absolute value of rounding; its sign must not become a gradient."""
    module = fitted(tmp_path_factory.mktemp("run"), KLCov, ratio=0.5)
    rows = prompts(KLCov)
    module.state.sampled_at = module.state.updates
    batch = module.compute_advantages(scored_pass(module, rows))
    assert module.state.before_first_update
    first = gradient(module, batch)
    moved = gradient(module, one_pass(module, rows))
    assert not module.state.before_first_update
    module.beta = 0.0
    assert not torch.equal(gradient(module, one_pass(module, rows)), moved)
    module.state.sampled_at = module.state.updates
    assert torch.equal(gradient(module, batch), first)
