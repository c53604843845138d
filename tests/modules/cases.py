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
    first_group: int = 0,
    format_NG: float = 0.0,
    tokens: Sequence[int] = (),
    finish: Sequence[FinishReason] = (),
) -> Experience:
    """Groups whose samples have these accuracies; reward = accuracy + the sample's number x ``format_NG``."""
    group_size, samples = len(accuracy_PG[0]), sum(map(len, accuracy_PG))
    prompts = [prompt(uids[p]) for p in range(len(accuracy_PG))]
    lengths, ends = tokens or [2] * samples, finish or ["stop"] * samples
    rollouts = [
        rollout(prompts[n // group_size], first_group + n // group_size, lengths[n], ends[n]) for n in range(samples)
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
