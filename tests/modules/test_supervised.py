"""SFT is cross-entropy and DPO its formula, without engine and reward."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from rllava_pl.loop.batch import split_minibatches
from rllava_pl.loop.options import Batching
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy
from rllava_pl.modules import DPO, SFT, PolicyModule
from rllava_pl.rollout.callbacks import TransformersRollout
from rllava_pl.types import Prompt, RolloutEngine, Sampling
from tests import runs
from tests.modules.passes import gradient, one_pass, prompts, recording_updater

PREFERENCES = {f"val/{x}" for x in ("margin", "pair_accuracy", "chosen_reward", "rejected_reward", "chosen_nll")}


class NoEngine(TransformersRollout):
    """An engine that must not be built."""

    def build(self, module: object) -> RolloutEngine:
        raise AssertionError("an engine was built")


def without_rewards(algorithm: type[PolicyModule], **options: object) -> PolicyModule:
    return runs.module(algorithm, rewards=[], **options)


def fit(root: Path, module: PolicyModule, train_size: int = 24, **options: object) -> dict[str, float]:
    trainer = runs.trainer(root, callbacks=[NoEngine()], **options)
    trainer.fit(module, runs.data(demonstrations=1.0, train_size=train_size))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("algorithm", [SFT, DPO])
def test_no_engine_is_built_in_training_and_validation(tmp_path: Path, algorithm: type[PolicyModule]) -> None:
    validation = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 2}
    metrics = fit(tmp_path, without_rewards(algorithm, max_rollouts=2), **validation)
    expected = {SFT: {"val/nll"}, DPO: PREFERENCES}[algorithm]
    assert {name for name in metrics if name.startswith("val/")} == expected
    assert not any(name.startswith("train/reward") for name in metrics)


def test_rewards_score_greedy_answers_of_validation(tmp_path: Path) -> None:
    module = runs.module(SFT, max_rollouts=1)
    validation = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = runs.trainer(tmp_path, **validation)
    trainer.fit(module, runs.data(demonstrations=1.0))
    assert {"val/accuracy", "val/reward", "val/nll"} <= set(trainer.callback_metrics)


def cross_entropy(policy: Policy, batch: list[Prompt]) -> tuple[torch.Tensor, int]:
    """Sum over the target's tokens, from the model's own logits, one row at a time; and their number."""
    total, tokens = torch.zeros(()), 0
    for prompt, inputs in zip(batch, policy.encode(batch), strict=True):
        ids_T = policy.encode_response(prompt.target)
        row = policy.collate([extend(inputs, ids_T.tolist())])
        logits_TV = policy.model(**row, use_cache=False).logits[0, -len(ids_T) - 1 : -1]
        logits_TV = logits_TV.index_fill(1, torch.tensor(policy.banned_ids), float("-inf"))
        total = total + torch.nn.functional.cross_entropy(logits_TV, ids_T, reduction="sum")
        tokens += len(ids_T)
    return total, tokens


def test_gradient_of_sft_is_that_of_cross_entropy(tmp_path: Path) -> None:
    """A mean over the target tokens of each of two mini-batches."""
    module = without_rewards(SFT, max_rollouts=1, sampling=Sampling(max_tokens=12))
    fit(tmp_path, module)
    rows = [dataclasses.replace(prompt, target=prompt.target + " red" * p) for p, prompt in enumerate(prompts(SFT, 4))]
    batch = one_pass(module, rows)
    assert len(set(batch.trained_mask_NT.sum(1).tolist())) == 4
    for part, chosen in zip(split_minibatches(batch, 2, [0, 2, 1, 3]), ([0, 2], [1, 3]), strict=True):
        ours = gradient(module, part, 1)
        module.zero_grad()
        total, tokens = cross_entropy(module.policy, [rows[p] for p in chosen])
        (total / tokens).backward()
        theirs = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_reported_loss_is_the_mean_negative_log_likelihood(tmp_path: Path) -> None:
    start = without_rewards(SFT)
    start.configure_model()
    with torch.no_grad():
        data = runs.data(batch_size=24, demonstrations=1.0)
        data.setup("fit")
        total, tokens = cross_entropy(start.policy, list(data.train_prompts))
    trainer = runs.trainer(tmp_path)
    trainer.fit(without_rewards(SFT, max_rollouts=1, batching=Batching()), data)
    for name in ("loss", "policy_loss", "nll"):
        assert trainer.callback_metrics[f"train/{name}"] == pytest.approx(float(total) / tokens, rel=1e-5)


def test_dpo_starts_at_ln_2_without_margin(tmp_path: Path) -> None:
    """The policy is its reference: h = 0, loss = -log σ(0) = ln 2."""
    metrics = fit(tmp_path, without_rewards(DPO, max_rollouts=1, batching=Batching()))
    assert metrics["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["train/margin"] == pytest.approx(0, abs=1e-6)


def test_margin_of_dpo_grows_and_the_chosen_response_is_preferred(tmp_path: Path) -> None:
    module = without_rewards(DPO, beta=1.0, max_rollouts=12)
    metrics = fit(tmp_path, module, train_size=4)
    assert metrics["train/margin"] > 0.5
    assert metrics["train/pair_accuracy"] > 0.9
    assert metrics["train/chosen_reward"] - metrics["train/rejected_reward"] == pytest.approx(metrics["train/margin"])
    assert metrics["train/loss"] < math.log(2)


def test_loss_of_dpo_is_its_formula(tmp_path: Path) -> None:
    module = without_rewards(DPO, beta=0.5, label_smoothing=0.1, max_rollouts=2)
    fit(tmp_path, module)
    batch = one_pass(module, prompts(DPO, 3))
    with torch.no_grad():
        output = module(batch.policy_batch())
    updater, _ = recording_updater(module)
    assert updater.step(batch, module.terms, module.losses)
    loss = updater.metrics.means()["pair_loss"]
    expected = 0.0
    for p in range(3):
        gap = ((output.logp_NT - batch.ref_logp_NT) * batch.trained_mask_NT).sum(1)[2 * p : 2 * p + 2].double()
        h = 0.5 * (gap[0] - gap[1])
        assert abs(h) > 1e-3
        expected -= float(0.9 * torch.sigmoid(h).log() + 0.1 * torch.sigmoid(-h).log()) / 3
    assert loss == updater.metrics.means()["loss"] == pytest.approx(expected, rel=1e-5)


def test_pair_is_never_separated(tmp_path: Path) -> None:
    """One row a micro-batch is not possible: it holds the pair."""
    module = without_rewards(DPO, max_rollouts=1, batching=Batching(micro_batch_size=1))
    assert fit(tmp_path, module)["train/micro_batch_size"] == 2


@pytest.mark.parametrize(("algorithm", "missing"), [(SFT, "target"), (DPO, "target"), (DPO, "rejected")])
def test_missing_response_is_refused_with_its_row(tmp_path: Path, algorithm: type[PolicyModule], missing: str) -> None:
    module = without_rewards(algorithm, max_rollouts=1)
    fit(tmp_path, module)
    row = dataclasses.replace(prompts(algorithm, 1)[0], **{missing: ""})
    message = rf"{missing} of prompt '{row.uid}' \({row.source}\): it is empty, so there is nothing to train on"
    with pytest.raises(ValueError, match=message):
        module.given_batch([row], "train")
