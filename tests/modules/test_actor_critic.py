"""A critic's value depends on the state and on nothing later; its advantages vary less than those of a constant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from rllava_pl.functional.advantages import gae
from rllava_pl.loop.options import KL, Schedule
from rllava_pl.modules import PPO, RLModule
from rllava_pl.modules.actor_critic import explained_variance
from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.types import PromptBatch, Rollout, Score
from tests import runs
from tests.modules.cases import two_groups
from tests.modules.passes import fitted, one_pass, prompts, recording_updater

KINDS = ["shared", "head", "separate"]


def names_with_gradient(module: RLModule) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.fixture(scope="module", params=KINDS)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    return fitted(tmp_path_factory.mktemp("run"), PPO, critic=request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_values_begin_at_zero(kind: str) -> None:
    module = runs.module(PPO, critic=kind)
    module.configure_model()
    assert not module.value_head.weight.any() and not module.value_head.bias.any()
    assert module.value_head.weight.dtype == torch.float32


def test_value_depends_on_the_image_and_on_earlier_tokens_alone(module: RLModule) -> None:
    rows = prompts(PPO, 2)
    batch = module.score(module.sample(PromptBatch(rows)))
    with torch.no_grad():
        values_NT = module(batch.policy_batch()).values_NT
        assert values_NT[batch.trained_mask_NT].std() > 0 and not values_NT[~batch.trained_mask_NT].any()
        for t in range(batch.trained_mask_NT.shape[1]):
            ids_NT = batch.response_ids_NT.clone()
            ids_NT[:, t:] = (ids_NT[:, t:] + 3) % 50 + 5
            changed_NT = module(batch.replace(response_ids_NT=ids_NT).policy_batch()).values_NT
            torch.testing.assert_close(changed_NT[:, : t + 1], values_NT[:, : t + 1], atol=1e-5, rtol=0)
            later = batch.trained_mask_NT[:, t + 1 :]
            assert not later.any() or not torch.allclose(changed_NT[:, t + 1 :], values_NT[:, t + 1 :], atol=1e-4)
        grey = dataclasses.replace(rows[0], images=(Image.new("RGB", rows[0].images[0].size),))
        other = batch.replace(inputs=tuple(module.policy.encode([grey, rows[1]])))
        other_NT = module(other.policy_batch()).values_NT
    assert (other_NT[:4] - values_NT[:4]).abs().max() > 1e-3
    torch.testing.assert_close(other_NT[4:], values_NT[4:], atol=1e-5, rtol=0)


def test_gradient_of_values_reaches_the_trunk_of_its_kind(module: RLModule) -> None:
    """shared: in the trunk of the policy; head: at the head; separate: in a second trunk."""
    batch = module.score(module.sample(PromptBatch(prompts(PPO, 2))))
    module.zero_grad()
    module(batch.policy_batch()).values_NT.square().sum().backward()
    reached = {name.split(".")[0] for name in names_with_gradient(module)}
    trunk = {"shared": {"policy"}, "head": set(), "separate": {"critic_model"}}[module.critic]
    assert reached == trunk | {"value_head"}
    assert not any("lm_head" in name for name in names_with_gradient(module) if name.startswith("critic"))


def test_every_trainable_parameter_of_an_update_has_a_gradient(module: RLModule) -> None:
    """A parameter without one would stop a distributed strategy."""
    updater, steps = recording_updater(module)
    steps.zero_grad = lambda: None  # so that the gradients stay
    assert updater.step(one_pass(module, prompts(PPO)), module.terms, module.losses)
    named = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name, p in module.named_parameters() if p.grad is not None} == named


def test_head_has_a_higher_learning_rate(module: RLModule) -> None:
    groups = module.optimizers().optimizer.param_groups
    assert [group["lr"] for group in groups] == [pytest.approx(1e-3), pytest.approx(1e-2)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in module.value_head.parameters()}
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == sum(p.requires_grad for p in module.parameters())


def test_schedule_keeps_the_factor_of_the_head() -> None:
    module = runs.module(PPO, critic_lr_factor=3.0, schedule=Schedule(warmup_steps=4))
    module.configure_model()
    (optimizer,), (schedule,) = module.configure_optimizers()
    for _ in range(3):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])


def test_policy_is_unchanged_while_the_critic_alone_is_trained(tmp_path: Path) -> None:
    start, module = runs.module(PPO), runs.module(PPO, critic="head", critic_warmup_steps=4, max_rollouts=2)
    start.configure_model()
    runs.trainer(tmp_path).fit(module, runs.data())
    after = dict(module.policy.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in start.policy.named_parameters())
    assert module.state.updates == 4 and module.value_head.weight.any()
    module = runs.module(PPO, critic="head", critic_warmup_steps=3, max_rollouts=2)
    runs.trainer(tmp_path).fit(module, runs.data())
    after = dict(module.policy.named_parameters())
    assert any(not torch.equal(p, after[name]) for name, p in start.policy.named_parameters())


def test_loss_is_policy_and_half_the_value_loss(tmp_path: Path) -> None:
    """With advantages 0, ½ · mean over tokens of ½·max((V-R)², (clip(V, V_old ± ½) - R)²)."""
    module = fitted(tmp_path, PPO, kl=KL(reward_coef=0.0))
    batch = one_pass(module, prompts(PPO))
    old_NT = batch.values_NT + 0.8  # beyond the clip range
    batch = batch.replace(advantages_NT=torch.zeros_like(old_NT)).with_computed(values_NT=old_NT)
    with torch.no_grad():
        output = module(batch.policy_batch())
    updater, _ = recording_updater(module)
    assert updater.step(batch, module.terms, module.losses)
    means = updater.metrics.means()
    mask_NT, returns_NT = batch.trained_mask_NT, batch.returns_NT
    clipped_NT = torch.minimum(torch.maximum(output.values_NT, old_NT - 0.5), old_NT + 0.5)
    error_NT = torch.maximum((output.values_NT - returns_NT) ** 2, (clipped_NT - returns_NT) ** 2)
    half = float(0.5 * error_NT[mask_NT].mean())
    assert means["value_loss"] == pytest.approx(half, rel=1e-5)
    assert means["loss"] == pytest.approx(0.5 * half, rel=1e-5)


def instance(**options: object) -> PPO:
    return PPO(None, [AnswerTagReward()], **options)


def test_advantages_and_returns_are_those_of_gae() -> None:
    batch = two_groups()
    states = (batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT)
    advantages_NT, returns_NT = instance(gamma=0.9, lam=0.8).estimate(batch)
    expected_NT, expected_returns_NT = gae(*states, gamma=0.9, lam=0.8)
    assert torch.equal(advantages_NT, expected_NT)
    torch.testing.assert_close(returns_NT[batch.sampled_mask_NT], expected_returns_NT[batch.sampled_mask_NT])


def test_returns_may_have_another_lambda() -> None:
    batch = two_groups()
    states = (batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT)
    advantages_NT, returns_NT = instance(lam=0.5, lam_critic=1.0).estimate(batch)
    assert torch.equal(advantages_NT, gae(*states, lam=0.5)[0])
    mask_NT = batch.sampled_mask_NT
    to_go_NT = (batch.token_rewards_NT * mask_NT).flip(1).cumsum(1).flip(1)  # λ = 1: the rewards to go
    torch.testing.assert_close(returns_NT[mask_NT], to_go_NT[mask_NT])


def test_lambda_grows_with_the_length() -> None:
    """α = 0.5: 1 - 1/(0.5·l) is 0 for at most 2 tokens, 1/3 for 3, 1/2 for 4."""
    batch = two_groups()
    lam_N = torch.tensor([{0: 0.0, 1: 0.0, 2: 0.0, 3: 1 / 3, 4: 0.5}[n] for n in batch.lengths_N.tolist()])
    expected_NT, _ = gae(batch.token_rewards_NT, batch.values_NT, batch.sampled_mask_NT, lam=lam_N)
    torch.testing.assert_close(instance(length_adaptive=0.5).estimate(batch)[0], expected_NT)


def test_exact_critic_gives_advantages_of_less_variance_than_a_constant() -> None:
    """Two prompts, easy (right 3 of 4 times) and hard (1 of 4); a first token that decides, a second that does not.

    Values: P(right) of the prompt, then the outcome itself, since the first token has decided. Advantages (λ = 1) of
    the first tokens: 1/4, 1/4, 1/4, -3/4 | 3/4, -1/4, -1/4, -1/4, of the second tokens 0: variance (6·1/16 + 2·9/16)
    / 16 = 3/32. The best constant, 1/2, gives ±1/2 on all 16 tokens: 1/4.
    """
    outcome_N = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    reward_NT = torch.stack([torch.zeros(8), outcome_N], 1)
    mask_NT = torch.ones(8, 2, dtype=torch.bool)
    known_NT = torch.stack([torch.tensor([0.75] * 4 + [0.25] * 4), outcome_N], 1)
    module = instance()
    variance = {}
    for name, values_NT in {"critic": known_NT, "constant": torch.full((8, 2), 0.5)}.items():
        batch = two_groups().replace(token_rewards_NT=reward_NT, sampled_mask_NT=mask_NT)
        advantages_NT, returns_NT = module.estimate(batch.with_computed(values_NT=values_NT))
        raw_NT = returns_NT - values_NT
        variance[name] = float(raw_NT.var(correction=0))
        assert torch.corrcoef(torch.stack([raw_NT.flatten(), advantages_NT.flatten()]))[0, 1] > 0.9999  # whitened
    assert variance == pytest.approx({"critic": 3 / 32, "constant": 1 / 4})


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns, returns + 7) == 1  # a constant error is a bias, not a variance
    assert explained_variance(returns, torch.full((4,), 1.5)) == 0
    assert explained_variance(returns, -returns) == pytest.approx(-3)  # Var(2R) = 4 Var(R)
    assert explained_variance(torch.ones(4), returns) == 0
    assert explained_variance(torch.ones(0), torch.ones(0)) == 0


class Warm(BaseReward):
    """Whatever is answered: 1 for pictures of some colours, 0 for others, so that the state is all there is to know."""

    def score(self, rollout: Rollout) -> Score:
        return Score(float(rollout.prompt.answer in ("red", "yellow", "purple")))


@pytest.mark.slow
def test_critic_learns_the_values_of_a_fixed_policy(tmp_path: Path) -> None:
    """The policy is held still, so that what is to be predicted stays the same."""
    losses: list[float] = []
    explained: list[float] = []
    options = {"critic": "separate", "critic_warmup_steps": 1000, "max_rollouts": 40}
    module = runs.module(PPO, rewards=[Warm()], **options)
    module.on_train_batch_end = lambda *_: (
        losses.append(float(module.trainer.callback_metrics["train/value_loss"])),
        explained.append(float(module.trainer.callback_metrics["train/explained_variance"])),
    )[0]
    runs.trainer(tmp_path).fit(module, runs.data(batch_size=16, train_size=240))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert sum(explained[-5:]) / 5 > 0.5 > 0.1 > sum(explained[:3]) / 3
