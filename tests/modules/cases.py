"""Experience made by hand, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from rllava_pl.types import IMAGE, Experience, FinishReason, Message, Prompt, PromptInputs, Rollout

PICTURE = Image.new("RGB", (4, 4), (220, 40, 40))


def prompt(uid: str = "p", **fields: object) -> Prompt:
    return Prompt(uid, (Message("user", (IMAGE, "Which?")),), (PICTURE,), answer="red", **fields)


def rollout(of: Prompt, group: int, tokens: int = 2, finish_reason: FinishReason = "stop") -> Rollout:
    ids_S = torch.tensor([1, 2, 3])
    return Rollout(
        prompt=of,
        group=group,
        prompt_ids=ids_S,
        inputs=PromptInputs(ids_S, {"kind": torch.zeros(3)}, {"pixels": torch.ones(1, 3, 4, 4)}),
        response_ids=torch.arange(tokens) + 5,
        engine_logprobs=torch.full((tokens,), -0.5),
        response_mask=torch.ones(tokens, dtype=torch.bool),
        finish_reason=finish_reason,
        weight_version=0,
        text="red",
    )


def experience(
    accuracy_PG: Sequence[Sequence[float]],
    *,
    uids: Sequence[str] = "abcdefgh",
    format_NG: float = 0.0,
    tokens: Sequence[int] = (),
    finish: Sequence[FinishReason] = (),
) -> Experience:
    """Groups whose samples have these accuracies; reward = accuracy + the sample's number x ``format_NG``."""
    group_size, samples = len(accuracy_PG[0]), sum(map(len, accuracy_PG))
    prompts = [prompt(uids[p]) for p in range(len(accuracy_PG))]
    lengths, ends = tokens or [2] * samples, finish or ["stop"] * samples
    rollouts = [
        rollout(prompts[n // group_size], ord(uids[n // group_size]), lengths[n], ends[n]) for n in range(samples)
    ]
    accuracy_N = torch.tensor(accuracy_PG).flatten()
    mask_NT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Experience(
        rollouts=tuple(rollouts),
        inputs=tuple(r.inputs for r in rollouts[::group_size]),
        group_size=group_size,
        group_N=torch.tensor([r.group for r in rollouts]),
        response_ids_NT=torch.nn.utils.rnn.pad_sequence([r.response_ids for r in rollouts], batch_first=True),
        mask_NT=mask_NT,
        demo_mask_NT=torch.zeros_like(mask_NT),
        engine_logp_NT=-0.5 * mask_NT,
        rewards_N=accuracy_N + format_NG * (torch.arange(samples) % group_size),
        components={"accuracy": accuracy_N},
    )


def two_groups() -> Experience:
    """Two groups of three rows; ratios from e^-1 to e^0.5, a row that is partly masked, a row partly demonstrated."""
    generator = torch.Generator().manual_seed(0)
    mask_NT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    demo_mask_NT = torch.zeros_like(mask_NT)
    demo_mask_NT[2, :3] = demo_mask_NT[5] = True
    rewards_N = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    old_logp_NT = -torch.rand(6, 4, generator=generator) - 0.5
    return Experience(
        rollouts=(),
        inputs=(),
        group_size=3,
        group_N=torch.tensor([4, 4, 4, 7, 7, 7]),
        response_ids_NT=torch.zeros(6, 4, dtype=torch.int64),
        mask_NT=mask_NT,
        demo_mask_NT=demo_mask_NT & mask_NT,
        engine_logp_NT=old_logp_NT,
        rewards_N=rewards_N,
        old_logp_NT=old_logp_NT,
        token_rewards_NT=torch.randn(6, 4, generator=generator) * mask_NT,
        values_NT=torch.randn(6, 4, generator=generator) * mask_NT,
        advantages_NT=(rewards_N - 0.4)[:, None].expand(6, 4).contiguous(),
        selected_NT=torch.rand(6, 4, generator=generator) < 0.3,
        entropy_NT=torch.rand(6, 4, generator=generator),
    )
