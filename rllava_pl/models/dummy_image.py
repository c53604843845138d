"""An image about nothing, for batches without one: on several ranks every forward must run the vision tower.

Where weights are sharded, a layer is gathered by all ranks together, and a rank that reads text alone would never come
to the tower that the others wait in. Where they are replicated, the tower's parameters would have no gradient to send.
So the image goes into the left padding of a batch's first row, where nobody attends to it: the same layers run in the
same order, outputs are untouched and the gradient of the tower is exactly 0.
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
"""Pixels of the image; processors enlarge it to the smallest size they know."""


def blank_prompt(processor: Processor, family: Family) -> PromptInputs:
    """A prompt of one black image, or of one letter where the model has no eyes."""
    from PIL.Image import new

    if not hasattr(processor, "image_processor"):
        return encode(processor, [Prompt("blank", (Message("user", (".",)),))], family)[0]
    prompt = Prompt("blank", (Message("user", (IMAGE,)),), images=(new("RGB", (SIDE, SIDE)),))
    return encode(processor, [prompt], family)[0]


def with_blank(inputs: Sequence[PromptInputs], blank: PromptInputs) -> list[PromptInputs]:
    """The prompts, the first of them behind ``blank``; ``hide`` then makes that padding."""
    first = inputs[0]
    tokens = {name: torch.cat([blank.tokens[name], x]) for name, x in first.tokens.items()}
    ids_S = torch.cat([blank.input_ids_S, first.input_ids_S])
    return [PromptInputs(ids_S, tokens, blank.images), *inputs[1:]]


def hide(attention_PS: Tensor, tokens: int) -> None:
    """Turn the first ``tokens`` real tokens of the first row into padding, in place."""
    start = attention_PS.shape[1] - int(attention_PS[0].sum())
    attention_PS[0, start : start + tokens] = 0
