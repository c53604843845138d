"""A critic beside the policy: values, generalized advantages, and the value loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rllava_pl.distributed.collectives import world_size
from rllava_pl.functional.losses import value_clipped
from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.loop.checks import NOT_NEGATIVE, POSITIVE
from rllava_pl.loop.experience import over_ranks
from rllava_pl.loop.optimization import Counts
from rllava_pl.loop.recovery import Done
from rllava_pl.models.policy import Policy, spread
from rllava_pl.modules.base import RLModule
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput

CriticKind = Literal["shared", "head", "separate"]


class ActorCritic(RLModule):
    """RL with a learnt baseline V(s).

    V is read at the position that predicts the token: it knows the images and what stands before, and nothing later.

    loss = policy + ``vf_coef`` · ½·max((V - R)², (clip(V, V_old ± ``value_clip``) - R)²), mean over tokens.

    Args:
        critic: "shared": a scalar head on the policy's last hidden states, its gradient reaches the trunk; "head": the
            same, the gradient stops at the head; "separate": a second model, loaded from the same checkpoint.
        vf_coef: Weight of the value loss.
        value_clip: How far V may move from its old value before the loss stops pulling.
        critic_lr_factor: Learning rate of the head as a multiple of the policy's.
        critic_warmup_steps: Optimizer steps in which the critic alone is trained.
    """

    needs_values = True
    ranges = RLModule.ranges | {
        "vf_coef": NOT_NEGATIVE,
        "critic_lr_factor": POSITIVE,
        "critic_warmup_steps": NOT_NEGATIVE,
    }
    choices = RLModule.choices | {"critic": get_args(CriticKind)}

    def __init__(
        self,
        *args,
        critic: CriticKind = "shared",
        vf_coef: float = 0.5,
        value_clip: float = 0.5,
        critic_lr_factor: float = 10.0,
        critic_warmup_steps: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.critic_kind = critic
        self.vf_coef, self.value_clip = vf_coef, value_clip
        self.critic_lr_factor, self.critic_warmup_steps = critic_lr_factor, critic_warmup_steps
        self.critic: Policy | None = None

    def configure_model(self) -> None:
        """Policy, reference and critic; the head begins at 0, so that V = 0."""
        if hasattr(self, "policy"):
            return
        super().configure_model()
        width = self.policy.model.config.get_text_config().hidden_size
        self.value_head = ValueHead(width, device=self.policy.device)
        if self.critic_kind == "separate":
            self.critic = self.load_policy()
            _freeze_untied_head(self.critic)

    def forward(self, batch: PolicyBatch, reference: bool = False) -> PolicyOutput:
        """Log-probs, entropies and values of the response tokens; a reference has no values."""
        if reference:
            return super().forward(batch, reference=True)
        hidden_MH = self.policy.hidden(batch)
        states_MH = hidden_MH if self.critic is None else self.critic.hidden(batch)
        if self.critic_kind == "head":
            states_MH = states_MH.detach()
        values_M = self.value_head(states_MH)
        mask_NT = batch.mask_NT.to(values_M.device)
        return self.policy.read(hidden_MH, batch)._replace(values_NT=spread(values_M, mask_NT))

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Policy and separate critic at the learning rate, the head at a multiple."""
        trunk = [p for p in self.critic.parameters() if p.requires_grad] if self.critic is not None else []
        (policy, factor), *_ = super().parameter_groups()
        return [(policy + trunk, factor), (list(self.value_head.parameters()), self.critic_lr_factor)]

    def credit(self, experience: Experience) -> Experience:
        """Advantages and returns, from the rollout batch of all ranks."""
        experience = self.shape(experience)
        everyone, own = over_ranks(experience)
        self.adapt_kl(everyone)
        advantages_NT, returns_NT = self.estimate(everyone)
        returns, values = returns_NT[everyone.mask_NT], everyone.values_NT[everyone.mask_NT]  # type: ignore[index]
        self.tally.add("explained_variance", explained_variance(returns, values))
        kept = (own, slice(experience.mask_NT.shape[1]))
        return experience.replace(advantages_NT=advantages_NT[kept], returns_NT=returns_NT[kept])

    @property
    def warms_up(self) -> bool:
        """Whether the critic alone is trained at this step."""
        return self.weight_version < self.critic_warmup_steps

    def estimate(self, everyone: Experience) -> tuple[Tensor, Tensor]:
        """Advantages and returns of every token, (N, T) each, from the gathered batch of all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate(self, everyone)")

    def loss(self, output: PolicyOutput, batch: Experience, counts: Counts) -> Tensor:
        """Policy loss, silent while the critic warms up, + value loss."""
        value_NT = value_clipped(output.values_NT, batch.values_NT, batch.returns_NT, clip=self.value_clip)
        value_loss = reduce_loss(value_NT, batch.mask_NT, "token-mean", denominator=counts.tokens)
        self.tally.add("value_loss", value_loss, 0)  # counted once an optimizer step, as the loss is
        return super().loss(output, batch, counts) * float(not self.warms_up) + self.vf_coef * value_loss

    def step(self, minibatch: Experience, losses: Sequence[Done[Tensor]]) -> bool:
        """As of every algorithm; one more value loss is complete."""
        if stepped := super().step(minibatch, losses):
            self.tally.add("value_loss", torch.zeros((), device=self.policy.device), 1 / world_size())
        return stepped


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
    """1 - Var(R - V) / Var(R), 0-dim: 1: the critic knows the returns, 0: no better than a constant, below: worse.

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
