from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import pytest
import torch

from rllava_pl.types import Json, Message, Prompt, PromptInputs, Rollout, Segment


def make_rollout(
    text: str = "",
    *,
    answer: Json = "4",
    uid: str = "row:0",
    source: str = "",
    ids: Sequence[int] = (7,),
    sampled: Sequence[bool] | None = None,
) -> Rollout:
    """A rollout as an engine would return it: runs of sampled tokens, with observations between them."""
    runs = groupby(zip(ids, sampled or [True] * len(ids), strict=True), key=lambda token: token[1])
    segments = []
    for is_sampled, run in runs:
        run_ids = torch.tensor([token for token, _ in run], dtype=torch.int64)
        segments.append(
            Segment(run_ids, "sampled", torch.zeros(len(run_ids)), weight_version=0)
            if is_sampled
            else Segment(run_ids, "observation")
        )
    return Rollout(
        prompt=Prompt(uid=uid, messages=(Message("user", ("Which digit is it?",)),), answer=answer, source=source),
        group=0,
        inputs=PromptInputs(torch.tensor([1, 2])),
        segments=tuple(segments) or (Segment(torch.empty(0, dtype=torch.int64), "sampled", torch.empty(0), 0),),
        text=text,
    )


@pytest.fixture(scope="session")
def rollout() -> Callable[..., Rollout]:
    return make_rollout
