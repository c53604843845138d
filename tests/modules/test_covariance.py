"""Clip-Cov and KL-Cov choose tokens over the whole mini-batch, whatever it is split into."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.modules import ClipCov, KLCov, RLModule
from rllava_pl.types import Experience, PromptBatch
from tests.modules.passes import fitted, gradient, one_pass, prompts

Place = tuple[str, tuple[int, ...], int]


@pytest.fixture(
    scope="module",
    params=[(ClipCov, {"ratio": 0.1, "lower": 0.0, "upper": 100.0}), (KLCov, {"ratio": 0.1})],
    ids=["ClipCov", "KLCov"],
)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    algorithm, options = request.param
    return fitted(tmp_path_factory.mktemp("run"), algorithm, **options)


def selected(module: RLModule, minibatch: Experience, micro_batch_size: int = 0) -> list[Place]:
    """Prompt, response and position of each chosen token."""
    pieces: list[Experience] = []
    policy_loss = type(module).policy_loss
    module.policy_loss = lambda logp, batch: (pieces.append(batch), policy_loss(module, logp, batch))[1]
    gradient(module, minibatch, micro_batch_size)
    del module.policy_loss
    return sorted(
        (piece.rollouts[n].prompt.uid, tuple(piece.rollouts[n].response_ids.tolist()), t)
        for piece in pieces[::2]  # once for the loss, once for what it cuts off
        for n, t in piece.selected_NT.nonzero().tolist()
    )


def test_the_same_tokens_are_chosen_in_any_split_and_order(module: RLModule) -> None:
    experience = one_pass(module, prompts(type(module)))
    tokens = int(experience.mask_NT.sum())
    chosen = selected(module, experience)
    assert len(chosen) == int(0.1 * tokens) > 8
    for size in (1, 2, 4, 8):
        assert selected(module, experience, size) == chosen
    assert selected(module, experience.select([5, 3, 1, 0, 2, 4])) == chosen


def test_a_small_ratio_still_takes_one_token_of_the_mini_batch_and_not_of_each_micro_batch(module: RLModule) -> None:
    experience = one_pass(module, prompts(type(module)))
    ratio, module.ratio = module.ratio, 1e-9
    assert len(selected(module, experience, 1)) == 1
    module.ratio = ratio


def test_the_draw_of_clip_cov_depends_on_the_update(tmp_path_factory: pytest.TempPathFactory) -> None:
    module = fitted(tmp_path_factory.mktemp("run"), ClipCov, ratio=0.05, lower=0.0, upper=100.0)
    experience = one_pass(module, prompts(ClipCov))
    first = selected(module, experience)
    assert selected(module, experience) == first
    module.updates_done += 1
    assert selected(module, experience) != first


def test_the_penalty_of_kl_cov_begins_when_the_policy_has_moved(tmp_path_factory: pytest.TempPathFactory) -> None:
    """At π = π_old the penalty |log ρ| is the absolute value of rounding; its sign must not become a gradient."""
    module = fitted(tmp_path_factory.mktemp("run"), KLCov, ratio=0.5)
    batch = PromptBatch(prompts(KLCov))
    experience = module.credit(module.evaluate(module.judge(module.rollout(batch))))
    assert module.first_update
    first = gradient(module, experience)
    module.rollout_version -= 1
    moved = gradient(module, one_pass(module, list(batch)))
    module.beta = 0.0
    assert not torch.equal(gradient(module, one_pass(module, list(batch))), moved)
    module.rollout_version = module.weight_version
    assert torch.equal(gradient(module, experience), first)
