"""A critic beside the policy: values, generalized advantages, and the value loss."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rllava_pl.functional._numerics import check_choice
from rllava_pl.functional.losses import value_clipped
from rllava_pl.loop.options import require, require_range
from rllava_pl.models.policy import Policy, spread
from rllava_pl.models.vlm import VLM
from rllava_pl.modules.base import RLModule
from rllava_pl.types import Credit, PolicyBatch, PolicyOutput, RewardedBatch, Term, TrainingBatch

CriticKind = Literal["shared", "head", "separate"]


class ActorCritic(RLModule):
    """RL with a learnt baseline V(s).

    V is read at the position that predicts the token: it depends on the images and on what stands before, and on
    nothing later.

    loss = policy + ``vf_coef`` · ½·max((V - R)², (clip(V, V_old ± ``value_clip``) - R)²), mean over tokens.

    Args:
        critic: "shared": a scalar head on the policy's last hidden states, its gradient reaches the trunk; "head": the
            same, the gradient stops at the head; "separate": a second model, loaded from the same checkpoint.
        vf_coef: Weight of the value loss.
        value_clip: How far V may move from its old value before its gradient is clipped.
        critic_lr_factor: Learning rate of the head as a multiple of the policy's.
        critic_warmup_steps: Optimizer steps in which the critic alone is trained.
        imitation_coef: Weight of -log π on right responses, mean over their tokens (VAPO, arXiv 2504.05118); 0: off.
        success_threshold: A response with at least this score is right.
    """

    needs_values = True

    def __init__(
        self,
        *args,
        critic: CriticKind = "shared",
        vf_coef: float = 0.5,
        value_clip: float = 0.5,
        critic_lr_factor: float = 10.0,
        critic_warmup_steps: int = 0,
        imitation_coef: float = 0.0,
        success_threshold: float = 1.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice("critic", critic, get_args(CriticKind))
        self.critic: CriticKind = critic
        self.vf_coef, self.value_clip = vf_coef, value_clip
        self.critic_lr_factor, self.critic_warmup_steps = critic_lr_factor, critic_warmup_steps
        self.imitation_coef, self.success_threshold = imitation_coef, success_threshold
        require_range(self, "vf_coef", "critic_warmup_steps", "imitation_coef")
        require(critic_lr_factor > 0, "critic_lr_factor", critic_lr_factor, "larger than 0")
        self.critic_model: VLM | None = None

    def configure_model(self) -> None:
        """Policy, reference and critic; the head begins at 0, so that V = 0."""
        if self.policy.loaded:
            return
        self.policy.prepare(self.seed)
        unloaded = copy.deepcopy(self.policy)
        super().configure_model()
        width = self.policy.model.config.get_text_config().hidden_size
        self.value_head = ValueHead(width, device=self.policy.device)
        if self.critic == "separate":
            self.critic_model = self.load_policy(unloaded)
            _freeze_untied_head(self.critic_model)

    def forward(self, batch: PolicyBatch, reference: bool = False, entropy: bool = True) -> PolicyOutput:
        """Log-probs, entropies and values of the response tokens; a reference has no values."""
        if reference:
            return super().forward(batch, reference=True, entropy=entropy)
        hidden_MH = self.policy.hidden(batch)
        states_MH = hidden_MH if self.critic_model is None else self.critic_model.hidden(batch)
        if self.critic == "head":
            states_MH = states_MH.detach()
        values_M = self.value_head(states_MH)
        mask_NT = batch.mask_NT.to(values_M.device)
        return self.policy.read(hidden_MH, batch, entropy=entropy)._replace(values_NT=spread(values_M, mask_NT))

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Policy and separate critic at the learning rate, the head at a multiple."""
        trunk = [] if self.critic_model is None else [p for p in self.critic_model.parameters() if p.requires_grad]
        (policy, factor), *_ = super().parameter_groups()
        return [(policy + trunk, factor), (list(self.value_head.parameters()), self.critic_lr_factor)]

    @property
    def trains_critic_only(self) -> bool:
        """Whether the critic alone is trained at this step."""
        return self.state.updates < self.critic_warmup_steps

    def estimate(self, batch: RewardedBatch) -> tuple[Tensor, Tensor]:
        """Advantages and returns of every token, (N, T) each, from the rollout batch of all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate(self, batch)")

    def advantages(self, batch: RewardedBatch) -> Credit:
        """Advantages and returns; logs how much of the returns the critic explains."""
        advantages_NT, returns_NT = self.estimate(batch)
        mask_NT = batch.sampled_mask_NT
        self.metrics.add("explained_variance", explained_variance(returns_NT[mask_NT], batch.values_NT[mask_NT]))
        return Credit(advantages_NT, returns=returns_NT)

    def terms(self, batch: TrainingBatch) -> dict[str, Term]:
        """The policy's terms, with weight 0 while the critic alone is trained; imitation; the value loss."""
        terms = super().terms(batch)
        if self.imitation_coef:
            right_NT = batch.trained_mask_NT & (batch.scores_N >= self.success_threshold)[:, None]
            terms["imitation"] = Term(right_NT, "token-mean", self.imitation_coef)
        if self.trains_critic_only:
            terms = {name: dataclasses.replace(term, weight=0.0) for name, term in terms.items()}
        return terms | {"value": Term(batch.trained_mask_NT, "token-mean", self.vf_coef)}

    def losses(self, output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        """Also -log π for the imitation, and the clipped value loss."""
        value_NT = value_clipped(output.values_NT, batch.values_NT, batch.returns_NT, clip=self.value_clip)
        return super().losses(output, batch) | {"imitation": -output.logp_NT, "value": value_NT}


class ValueHead(nn.Linear):
    """V of states (M, H) as (M,); 0 at first, in fp32 whatever the precision of the trunk: returns are regressed."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, 1, dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """V = 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states_MH: Tensor) -> Tensor:
        """V of every state."""
        return nn.functional.linear(states_MH.float(), self.weight.float(), self.bias.float())[:, 0]


def explained_variance(returns: Tensor, values: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R), 0-dim: 1: exact values, 0: no better than a constant, below: worse.

    0 where returns do not vary.
    """
    variance = returns.double().var(correction=0) if len(returns) else returns.new_zeros((), dtype=torch.float64)
    if not variance > 0:
        return torch.zeros_like(variance)
    return 1 - (returns - values).double().var(correction=0) / variance


def _freeze_untied_head(critic: Policy) -> None:
    """A critic never reads its vocabulary head; left trainable it would have no gradient."""
    head, embeddings = critic.model.get_output_embeddings(), critic.model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(False)
