"""A dummy image for batches without one: on several ranks every forward must run the vision tower.

Where weights are sharded, all ranks gather a layer together, and a rank whose batch holds text alone would never join
the gathering of the tower's layers. Where weights are replicated, the tower's parameters would have no gradient to
reduce. The dummy image goes into the left padding of the batch's first row, to which no token attends: the same layers
run in the same order, outputs do not change and the tower's gradient is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rllava_pl.models.encoding import encode
from rllava_pl.types import IMAGE, Message, Prompt, PromptInputs

if TYPE_CHECKING:
    from rllava_pl.models.encoding import Processor
    from rllava_pl.models.families import Family

SIDE = 32
"""Pixels of the image; processors enlarge it to the smallest size they accept."""


def dummy_prompt(processor: Processor, family: Family) -> PromptInputs:
    """A prompt of one black image, or of one character for a text-only model."""
    from PIL.Image import new

    if not hasattr(processor, "image_processor"):
        return encode(processor, [Prompt("dummy", (Message("user", (".",)),))], family)[0]
    prompt = Prompt("dummy", (Message("user", (IMAGE,)),), images=(new("RGB", (SIDE, SIDE)),))
    return encode(processor, [prompt], family)[0]


def prepend_dummy(inputs: Sequence[PromptInputs], dummy: PromptInputs) -> list[PromptInputs]:
    """The prompts, the first of them behind ``dummy``; ``mask_dummy`` then turns it into padding."""
    first = inputs[0]
    tokens = {name: torch.cat([dummy.tokens[name], x]) for name, x in first.tokens.items()}
    ids_S = torch.cat([dummy.input_ids_S, first.input_ids_S])
    return [PromptInputs(ids_S, tokens, dummy.images), *inputs[1:]]


def mask_dummy(attention_PS: Tensor, tokens: int) -> None:
    """Turn the first ``tokens`` real tokens of the first row into padding, in place."""
    start = attention_PS.shape[1] - int(attention_PS[0].sum())
    attention_PS[0, start : start + tokens] = 0
