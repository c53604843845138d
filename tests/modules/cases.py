"""Batches made by hand, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from rllava_pl.types import (
    IMAGE,
    FinishReason,
    Message,
    Prompt,
    PromptInputs,
    Rollout,
    ScoredBatch,
    Segment,
    TrainingBatch,
)

PICTURE = Image.new("RGB", (4, 4), (220, 40, 40))


def prompt(uid: str = "p", **fields: object) -> Prompt:
    return Prompt(uid, (Message("user", (IMAGE, "Which?")),), (PICTURE,), answer="red", **fields)


def rollout(of: Prompt, group: int, tokens: int = 2, finish_reason: FinishReason = "stop") -> Rollout:
    inputs = PromptInputs(torch.tensor([1, 2, 3]), {"kind": torch.zeros(3)}, {"pixels": torch.ones(1, 3, 4, 4)})
    segment = Segment(torch.arange(tokens) + 5, logprobs_T=torch.full((tokens,), -0.5), weight_version=0)
    return Rollout(of, group, inputs, (segment,), finish_reason, text="red")


def scored(
    accuracy_PG: Sequence[Sequence[float]],
    *,
    uids: Sequence[str] = "abcdefgh",
    format_NG: float = 0.0,
    tokens: Sequence[int] = (),
    finish: Sequence[FinishReason] = (),
) -> ScoredBatch:
    """Groups whose samples have these accuracies; score = accuracy + the sample's number x ``format_NG``."""
    group_size, samples = len(accuracy_PG[0]), sum(map(len, accuracy_PG))
    prompts = [prompt(uids[p]) for p in range(len(accuracy_PG))]
    lengths, ends = tokens or [2] * samples, finish or ["stop"] * samples
    rollouts = [
        rollout(prompts[n // group_size], ord(uids[n // group_size]), lengths[n], ends[n]) for n in range(samples)
    ]
    accuracy_N = torch.tensor(accuracy_PG).flatten()
    mask_NT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ScoredBatch(
        rollouts=tuple(rollouts),
        inputs=tuple(r.inputs for r in rollouts[::group_size]),
        group_size=group_size,
        group_N=torch.tensor([r.group for r in rollouts]),
        in_baseline_N=torch.ones(samples, dtype=torch.bool),
        response_ids_NT=torch.nn.utils.rnn.pad_sequence([r.response_ids for r in rollouts], batch_first=True),
        sampled_mask_NT=mask_NT,
        trained_mask_NT=mask_NT,
        engine_logp_NT=-0.5 * mask_NT,
        scores_N=accuracy_N + format_NG * (torch.arange(samples) % group_size),
        components={"accuracy": accuracy_N},
    )


def trainable(batch: ScoredBatch, advantages_NT: torch.Tensor | None = None) -> TrainingBatch:
    """A scored batch with its scores as rewards; without advantages, 1 on every trained token."""
    advantages_NT = batch.trained_mask_NT.float() if advantages_NT is None else advantages_NT
    token_rewards_NT = torch.zeros_like(batch.engine_logp_NT)
    rewards = {"rewards_N": batch.scores_N, "token_rewards_NT": token_rewards_NT}
    return batch.to_stage(TrainingBatch, advantages_NT=advantages_NT, **rewards)


def two_groups() -> TrainingBatch:
    """Two groups of three rows; ratios from e^-1 to e^0.5, a row that is partly masked, a row partly demonstrated."""
    generator = torch.Generator().manual_seed(0)
    mask_NT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    given_NT = torch.zeros_like(mask_NT)
    given_NT[2, :3] = given_NT[5] = True
    scores_N = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    old_logp_NT = -torch.rand(6, 4, generator=generator) - 0.5
    token_rewards_NT = torch.randn(6, 4, generator=generator) * mask_NT
    values_NT = torch.randn(6, 4, generator=generator) * mask_NT
    selected_NT = torch.rand(6, 4, generator=generator) < 0.3
    entropy_NT = torch.rand(6, 4, generator=generator)
    return TrainingBatch(
        rollouts=(),
        inputs=(),
        group_size=3,
        group_N=torch.tensor([4, 4, 4, 7, 7, 7]),
        in_baseline_N=torch.ones(6, dtype=torch.bool),
        response_ids_NT=torch.zeros(6, 4, dtype=torch.int64),
        sampled_mask_NT=mask_NT & ~given_NT,
        trained_mask_NT=mask_NT,
        engine_logp_NT=old_logp_NT,
        scores_N=scores_N,
        rewards_N=scores_N,
        token_rewards_NT=token_rewards_NT,
        advantages_NT=(scores_N - 0.4)[:, None].expand(6, 4).contiguous(),
        computed={
            "old_logp_NT": old_logp_NT,
            "values_NT": values_NT,
            "selected_NT": selected_NT,
            "entropy_NT": entropy_NT,
        },
    )
