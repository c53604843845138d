from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from rllava_pl.types import Message, Prompt, PromptInputs, Rollout


def make_rollout(
    text: str = "",
    *,
    answer: str = "4",
    uid: str = "row:0",
    source: str = "",
    ids: Sequence[int] = (7,),
    sampled: Sequence[bool] | None = None,
) -> Rollout:
    """A rollout as an engine would return it, of which rewards read the text, the ids and the prompt."""
    mask = torch.ones(len(ids), dtype=torch.bool) if sampled is None else torch.tensor(sampled, dtype=torch.bool)
    prompt_ids = torch.tensor([1, 2])
    return Rollout(
        prompt=Prompt(uid=uid, messages=(Message("user", ("Which digit is it?",)),), answer=answer, source=source),
        group=0,
        prompt_ids=prompt_ids,
        inputs=PromptInputs(prompt_ids),
        response_ids=torch.tensor(ids, dtype=torch.int64),
        engine_logprobs=torch.zeros(len(ids)),
        response_mask=mask,
        finish_reason="stop",
        weight_version=0,
        text=text,
    )


@pytest.fixture(scope="session")
def rollout() -> Callable[..., Rollout]:
    return make_rollout
