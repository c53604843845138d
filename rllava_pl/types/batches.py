"""Batches of tensors: a class for each stage that a batch has passed, and the terms of a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from rllava_pl.types.prompts import PromptInputs
from rllava_pl.types.rollouts import Rollout


@dataclass(frozen=True)
class PolicyBatch:
    """Input of the policy's forward: P prompts and their N = P * G responses."""

    inputs: tuple[PromptInputs, ...]
    """P prompts; each is computed once, whatever G is."""
    group_size: int
    response_ids_NT: Tensor
    """int64, padded on the right with any id."""
    mask_NT: Tensor
    """bool; True where a log-prob is wanted."""


class PolicyOutput(NamedTuple):
    """Output of the policy's forward; a tuple, so that sharding wrappers find its tensors."""

    logp_NT: Tensor
    """float32: log π(token | prompt, earlier tokens); finite everywhere, 0 at padding."""
    entropy_NT: Tensor
    """float32: entropy in nats of the distribution each token was drawn from; 0 at padding."""
    values_NT: Tensor | None = None
    """float32: a critic's value of the state each token was drawn in; 0 at padding, None without a critic."""


class MissingTensorError(LookupError):
    """An algorithm reads a tensor that nothing has computed for its batch."""


SOURCES: Mapping[str, str] = {
    "old_logp_NT": "declare needs_old_logp = True in the algorithm",
    "ref_logp_NT": "set kl.loss_coef or kl.reward_coef above 0, or declare needs_reference = True in the algorithm",
    "values_NT": "only algorithms with a critic have values: derive from ActorCritic",
    "returns_NT": "advantages() gives them: Credit(advantages, returns=...)",
    "selected_NT": "define select(minibatch) in the algorithm",
    "entropy_NT": "only losses have it: it belongs to the policy that is being trained",
}
"""How a batch comes to hold each tensor that only some algorithms need."""

BatchT = TypeVar("BatchT", bound="ScoredBatch")


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Rollouts and their scores as padded tensors, N rows, prompt-major, and each prompt's inputs once."""

    rollouts: tuple[Rollout, ...]
    """N, prompt-major."""
    inputs: tuple[PromptInputs, ...]
    """P: the multimodal inputs of each prompt, stored once."""
    group_size: int
    """Rows of each prompt: its samples, and what stands beside them, such as a demonstration."""
    group_N: Tensor
    """int64: equal for the rows of one baseline, unique over ranks; a row outside of a baseline is a group alone."""
    in_baseline_N: Tensor
    """bool: the row counts in statistics of its group."""
    response_ids_NT: Tensor
    """int64, right-padded with 0."""
    sampled_mask_NT: Tensor
    """bool: the policy sampled the token. Baselines and penalties read these."""
    trained_mask_NT: Tensor
    """bool: the token enters the losses, sampled or given."""
    engine_logp_NT: Tensor
    """float32: log-probs as the engine sampled, 0 at padding and at tokens it did not sample."""
    scores_N: Tensor
    """float32: weighted sum of the rewards; what decides whether a response is right."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 (N,) each: named parts of the rewards."""
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, T) each, by name: tensors that only some algorithms need, see ``SOURCES``; read them as attributes."""

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def given_mask_NT(self) -> Tensor:
        """bool: trained tokens that a demonstration or a hint gave."""
        return self.trained_mask_NT & ~self.sampled_mask_NT

    @property
    def own_mask_NT(self) -> Tensor:
        """bool: trained tokens that the policy sampled."""
        return self.trained_mask_NT & self.sampled_mask_NT

    @property
    def lengths_N(self) -> Tensor:
        """int64: sampled tokens of each row."""
        return self.sampled_mask_NT.sum(1)

    @property
    def old_logp_NT(self) -> Tensor:
        """float32: log-probs under the policy that sampled, in the trainer's arithmetic."""
        return self._computed("old_logp_NT")

    @property
    def ref_logp_NT(self) -> Tensor:
        """float32: log-probs under the reference policy."""
        return self._computed("ref_logp_NT")

    @property
    def values_NT(self) -> Tensor:
        """float32: the critic's values under the policy that sampled."""
        return self._computed("values_NT")

    @property
    def returns_NT(self) -> Tensor:
        """float32: what the critic is to predict."""
        return self._computed("returns_NT")

    @property
    def selected_NT(self) -> Tensor:
        """bool: tokens that a loss treats differently, chosen by ``select`` over the mini-batch of all ranks."""
        return self._computed("selected_NT")

    @property
    def entropy_NT(self) -> Tensor:
        """float32: entropies under the policy being trained, for losses that weigh by them."""
        return self._computed("entropy_NT")

    def _computed(self, name: str) -> Tensor:
        if name not in self.computed:
            raise MissingTensorError(f"this batch has no {name}; {SOURCES[name]}")
        return self.computed[name]

    def by_prompt(self, x: Tensor) -> Tensor:
        """(N, ...) as (P, rows of a prompt, ...)."""
        return x.reshape(-1, self.group_size, *x.shape[1:])

    def policy_batch(self, mask_NT: Tensor | None = None) -> PolicyBatch:
        """The forward's input for all of these rows; log-probs of the trained tokens unless another mask is given."""
        mask_NT = self.trained_mask_NT if mask_NT is None else mask_NT
        return PolicyBatch(self.inputs, self.group_size, self.response_ids_NT, mask_NT)

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_computed(self, **tensors: Tensor) -> Self:
        """A copy that holds these tensors as well, by the names in ``SOURCES``."""
        return self.replace(computed={**self.computed, **tensors})

    def to_stage(self, stage: type[BatchT], **tensors: Tensor) -> BatchT:
        """The same rows as a batch of a later stage, with the tensors which that stage adds."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return stage(**fields | tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with ``change`` applied to every per-row tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes: dict[str, object] = {name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        for name in ("components", "computed"):
            changes[name] = {key: change(x) for key, x in getattr(self, name).items()}
        return self.replace(**changes)

    def select(self, prompts: Sequence[int], members: Sequence[int] | None = None) -> Self:
        """The part with these prompts and these members of each group, cut to its longest response.

        Args:
            prompts: Positions in 0..P-1, in the order wanted.
            members: Which rows of each group; all by default.
        """
        kept = list(range(self.group_size)) if members is None else list(members)
        rows = [p * self.group_size + g for p in prompts for g in kept]
        index = torch.tensor(rows, dtype=torch.int64, device=self.trained_mask_NT.device)
        rollouts = tuple(self.rollouts[row] for row in rows)
        longest = max((len(rollout.response_ids) for rollout in rollouts), default=0)
        part = self.map(lambda x: x[index, :longest] if x.ndim == 2 else x[index])
        return part.replace(rollouts=rollouts, inputs=tuple(self.inputs[p] for p in prompts), group_size=len(kept))


@dataclass(frozen=True, kw_only=True)
class RewardedBatch(ScoredBatch):
    """A scored batch with penalties for length and KL divergence in its rewards; ``advantages`` reads it."""

    rewards_N: Tensor
    """float32: scores minus penalties."""
    token_rewards_NT: Tensor
    """float32: the same on tokens: the score on the last one, the KL penalty on every sampled one."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch(RewardedBatch):
    """A rewarded batch with the advantage of every token; ``policy_loss`` reads it."""

    advantages_NT: Tensor
    """float32: 0 outside of ``trained_mask_NT``."""


@dataclass(frozen=True)
class Credit:
    """What ``advantages`` may return where one tensor is not enough."""

    advantages: Tensor
    """Of each row (N,) or token (N, T)."""
    returns: Tensor | None = None
    """float32 (N, T): what a critic is to predict."""
    trained: Tensor | None = None
    """bool (N,): rows that stay in the losses; None: all that were."""


@dataclass(frozen=True)
class Term:
    """One named term of the loss: its weight, its tokens, and how they become one number."""

    mask_NT: Tensor
    """bool: tokens that count, in the sum and in the denominator."""
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"] = "token-mean"
    """See ``functional.reduce``."""
    weight: float = 1.0
    """Factor of the term in the loss."""
