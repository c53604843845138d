"""A critic knows the state and nothing later, and its advantages are calmer than a constant's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from rllava_pl.functional.advantages import gae
from rllava_pl.modules import PPO, RLModule
from rllava_pl.modules.actor_critic import explained_variance
from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.types import PromptBatch, Rollout, Score
from tests import runs
from tests.modules.cases import two_groups
from tests.modules.passes import fitted, gradient, one_pass, prompts

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


def test_a_value_depends_on_the_image_and_on_earlier_tokens_alone(module: RLModule) -> None:
    batch = prompts(PPO, 2)
    experience = module.judge(module.rollout(PromptBatch(batch)))
    with torch.no_grad():
        values_NT = module(experience.batch).values_NT
        assert values_NT[experience.mask_NT].std() > 0 and not values_NT[~experience.mask_NT].any()
        for t in range(experience.mask_NT.shape[1]):
            other_NT = experience.response_ids_NT.clone()
            other_NT[:, t:] = (other_NT[:, t:] + 3) % 50 + 5
            changed_NT = module(experience.replace(response_ids_NT=other_NT).batch).values_NT
            torch.testing.assert_close(changed_NT[:, : t + 1], values_NT[:, : t + 1], atol=1e-5, rtol=0)
            later = experience.mask_NT[:, t + 1 :]
            assert not later.any() or not torch.allclose(changed_NT[:, t + 1 :], values_NT[:, t + 1 :], atol=1e-4)
        grey = dataclasses.replace(batch[0], images=(Image.new("RGB", batch[0].images[0].size),))
        blind = experience.replace(inputs=tuple(module.policy.encode([grey, batch[1]])))
        seen_NT = module(blind.batch).values_NT
    assert (seen_NT[:4] - values_NT[:4]).abs().max() > 1e-3
    torch.testing.assert_close(seen_NT[4:], values_NT[4:], atol=1e-5, rtol=0)


def test_where_the_gradient_of_a_value_ends(module: RLModule) -> None:
    """shared: in the trunk of the policy; head: at the head; separate: in a trunk of its own."""
    experience = module.judge(module.rollout(PromptBatch(prompts(PPO, 2))))
    module.zero_grad()
    module(experience.batch).values_NT.square().sum().backward()
    reached = {name.split(".")[0] for name in names_with_gradient(module)}
    trunk = {"shared": {"policy"}, "head": set(), "separate": {"critic"}}[module.critic_kind]
    assert reached == trunk | {"value_head"}
    assert not any("lm_head" in name for name in names_with_gradient(module) if name.startswith("critic"))


def test_every_trainable_parameter_of_an_update_has_a_gradient(module: RLModule) -> None:
    """A parameter without one would stop a distributed strategy."""
    gradient(module, one_pass(module, prompts(PPO)))
    named = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name, p in module.named_parameters() if p.grad is not None} == named


def test_the_head_learns_faster(module: RLModule) -> None:
    groups = module.optimizers().optimizer.param_groups
    assert [group["lr"] for group in groups] == [pytest.approx(1e-3), pytest.approx(1e-2)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in module.value_head.parameters()}
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == sum(p.requires_grad for p in module.parameters())


def test_the_schedule_keeps_the_factor() -> None:
    module = runs.module(PPO, critic_lr_factor=3.0, warmup_steps=4)
    module.configure_model()
    (optimizer,), (schedule,) = module.configure_optimizers()
    for _ in range(3):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])


def test_a_critic_that_warms_up_alone_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    start, module = runs.module(PPO), runs.module(PPO, critic="head", critic_warmup_steps=4, max_rollouts=2)
    start.configure_model()
    runs.trainer(tmp_path).fit(module, runs.data())
    after = dict(module.policy.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in start.policy.named_parameters())
    assert module.weight_version == 4 and module.value_head.weight.any()
    module = runs.module(PPO, critic="head", critic_warmup_steps=3, max_rollouts=2)
    runs.trainer(tmp_path).fit(module, runs.data())
    after = dict(module.policy.named_parameters())
    assert any(not torch.equal(p, after[name]) for name, p in start.policy.named_parameters())


def test_the_loss_is_policy_and_half_the_value_loss(tmp_path: Path) -> None:
    """With advantages 0, ½ · mean over tokens of ½·max((V-R)², (clip(V, V_old ± ½) - R)²)."""
    module = fitted(tmp_path, PPO, kl_reward_coef=0.0)
    experience = one_pass(module, prompts(PPO))
    old_NT = experience.values_NT + 0.8  # beyond the clip range
    experience = experience.replace(advantages_NT=torch.zeros_like(old_NT), values_NT=old_NT)
    with torch.no_grad():
        output = module(experience.batch)
        loss = module.loss(output, experience, module.denominators(experience))
    mask_NT, returns_NT = experience.mask_NT, experience.returns_NT
    clipped_NT = torch.minimum(torch.maximum(output.values_NT, old_NT - 0.5), old_NT + 0.5)
    error_NT = torch.maximum((output.values_NT - returns_NT) ** 2, (clipped_NT - returns_NT) ** 2)
    assert float(loss) == pytest.approx(float(0.5 * 0.5 * error_NT[mask_NT].mean()), rel=1e-5)


def bare(**options: object) -> PPO:
    return PPO(None, [AnswerTagReward()], **options)


def test_advantages_and_returns_are_those_of_gae() -> None:
    batch = two_groups()
    states = (batch.token_rewards_NT, batch.values_NT, batch.mask_NT)
    advantages_NT, returns_NT = bare(gamma=0.9, lam=0.8).estimate(batch)
    expected_NT, expected_returns_NT = gae(*states, gamma=0.9, lam=0.8)
    assert torch.equal(advantages_NT, expected_NT)
    torch.testing.assert_close(returns_NT[batch.mask_NT], expected_returns_NT[batch.mask_NT])


def test_returns_may_have_a_lambda_of_their_own() -> None:
    batch = two_groups()
    states = (batch.token_rewards_NT, batch.values_NT, batch.mask_NT)
    advantages_NT, returns_NT = bare(lam=0.5, lam_critic=1.0).estimate(batch)
    assert torch.equal(advantages_NT, gae(*states, lam=0.5)[0])
    mask_NT = batch.mask_NT
    to_go_NT = (batch.token_rewards_NT * mask_NT).flip(1).cumsum(1).flip(1)  # λ = 1: the rewards to go
    torch.testing.assert_close(returns_NT[mask_NT], to_go_NT[mask_NT])


def test_lambda_grows_with_the_length() -> None:
    """α = 0.5: 1 - 1/(0.5·l) is 0 for 1 and 2 tokens, 1/3 for 3, 1/2 for 4."""
    batch = two_groups()
    lam_N = torch.tensor([{1: 0.0, 2: 0.0, 3: 1 / 3, 4: 0.5}[n] for n in batch.lengths_N.tolist()])
    expected_NT, _ = gae(batch.token_rewards_NT, batch.values_NT, batch.mask_NT, lam=lam_N)
    torch.testing.assert_close(bare(length_adaptive=0.5).estimate(batch)[0], expected_NT)


def test_a_critic_that_knows_the_state_gives_calmer_advantages_than_a_constant() -> None:
    """Two prompts, easy (right 3 of 4 times) and hard (1 of 4); a first token that decides, a second that does not.

    Values: P(right) of the prompt, then the outcome itself, since the first token has decided. Advantages (λ = 1) of
    the first tokens: 1/4, 1/4, 1/4, -3/4 | 3/4, -1/4, -1/4, -1/4, of the second tokens 0: variance (6·1/16 + 2·9/16)
    / 16 = 3/32. The best constant, 1/2, gives ±1/2 on all 16 tokens: 1/4.
    """
    outcome_N = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    reward_NT = torch.stack([torch.zeros(8), outcome_N], 1)
    mask_NT = torch.ones(8, 2, dtype=torch.bool)
    known_NT = torch.stack([torch.tensor([0.75] * 4 + [0.25] * 4), outcome_N], 1)
    module = bare()
    variance = {}
    for name, values_NT in {"critic": known_NT, "constant": torch.full((8, 2), 0.5)}.items():
        experience = two_groups().replace(token_rewards_NT=reward_NT, values_NT=values_NT, mask_NT=mask_NT)
        advantages_NT, returns_NT = module.estimate(experience)
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
def test_a_critic_learns_what_the_policy_is_worth(tmp_path: Path) -> None:
    """The policy is held still, so that what is to be predicted stays the same."""
    losses: list[float] = []
    explained: list[float] = []
    module = runs.module(PPO, critic="separate", critic_warmup_steps=1000, max_rollouts=40, group_size=4)
    module.on_train_batch_end = lambda *_: (
        losses.append(float(module.trainer.callback_metrics["train/value_loss"])),
        explained.append(float(module.trainer.callback_metrics["train/explained_variance"])),
    )[0]
    module.rewards = [Warm()]
    runs.trainer(tmp_path).fit(module, runs.data(batch_size=16, train_size=240))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert sum(explained[-5:]) / 5 > 0.5 > 0.1 > sum(explained[:3]) / 3
