"""Prompts to model inputs: chat template, processor, padding; written responses to token ids.

``encode`` runs the processor once over a batch and takes the result apart again, one ``PromptInputs`` a prompt, so that
prompts can be regrouped into mini- and micro-batches; ``collate`` pads a selection of them for one forward.
``encode_response`` turns a demonstration into the ids a policy would have sampled, ``extend`` appends ids to a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rllava_pl.models.families import FAMILIES, Family, ImageAxis
from rllava_pl.models.special_tokens import SpecialTokens, choose_marker
from rllava_pl.types import ImageSlot, Message, Prompt, PromptInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase

Chat = list[dict[str, str | list[dict[str, str]]]]
PaddingSide = Literal["left", "right"]


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    """The tokenizer inside a processor; a text-only model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def chat(messages: Sequence[Message], *, multimodal: bool = True) -> Chat:
    """Messages as chat templates expect them: content as typed parts, or as text for text-only models."""

    def part(piece: str | ImageSlot) -> dict[str, str]:
        return {"type": "image"} if isinstance(piece, ImageSlot) else {"type": "text", "text": piece}

    if multimodal:
        return [{"role": m.role, "content": [part(piece) for piece in m.parts]} for m in messages]
    return [{"role": m.role, "content": "".join(str(piece) for piece in m.parts)} for m in messages]


def check_prompt(prompt: Prompt) -> None:
    """Refuse a prompt whose image slots and images differ in number, or whose text no tokenizer can read.

    Raises:
        ValueError: Naming the row and what is wrong.
    """
    slots, images = sum(message.image_slots for message in prompt.messages), len(prompt.images)
    where = f"prompt {prompt.uid!r}" + (f" ({prompt.source})" if prompt.source else "")
    if slots != images:
        counts = f"{slots} image slot(s) but carries {images} image(s)"
        raise ValueError(f"{where} shows {counts}; every image needs exactly one slot")
    try:
        "".join(part for message in prompt.messages for part in message.parts if isinstance(part, str)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate in its text, which no tokenizer can read; remove it") from error


def prompt_text(processor: Processor, prompt: Prompt) -> str:
    """The prompt through the model's own chat template, up to where the assistant begins to answer."""
    multimodal = hasattr(processor, "image_processor")
    if prompt.images and not multimodal:
        raise ValueError(f"prompt {prompt.uid!r} carries images, but the model reads text only")
    conversation = chat(prompt.messages, multimodal=multimodal)
    return str(processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def encode(processor: Processor, prompts: Sequence[Prompt], family: Family | None = None) -> list[PromptInputs]:
    """Prompts as the model reads them, without padding, placeholders expanded.

    Texts that spell special tokens are encoded as text; see ``special_tokens``.

    Args:
        processor: Of the model, or its tokenizer for a text-only model.
        prompts: Any mix of several images, one image and none.
        family: Row of the family table; by default that of the processor's class.

    Raises:
        ValueError: Image slots and images of a prompt differ in number, or its text cannot be encoded.
    """
    if not prompts:
        return []
    for prompt in prompts:
        check_prompt(prompt)
    texts, markers = zip(*(_escaped_text(processor, prompt) for prompt in prompts), strict=True)
    images = [image for prompt in prompts for image in prompt.images]
    options = {"images": images} if images else {}
    bos = _adds_special_tokens(processor, texts[0])
    outputs = dict(processor(text=list(texts), padding=True, add_special_tokens=bos, return_tensors="pt", **options))
    ids, attention = outputs.pop("input_ids"), outputs.pop("attention_mask").bool()
    for p, marker in enumerate(markers):
        if marker is not None:
            attention[p, ids[p] == marker] = False
    if family is None:
        name = type(processor).__name__.removesuffix("Processor").lower().replace("_", "")
        family = next((row for key, row in FAMILIES.items() if key.replace("_", "") == name), Family())
    along_tokens = [name for name, x in outputs.items() if x.shape[:2] == ids.shape and x.ndim == 2]
    along = {name: outputs.pop(name) for name in along_tokens}
    image_parts = split_images(outputs, [len(prompt.images) for prompt in prompts], family.image_axis)
    return [
        PromptInputs(ids[p, kept], {name: x[p, kept] for name, x in along.items()}, image_parts[p])
        for p, kept in enumerate(attention)
    ]


def _escaped_text(processor: Processor, prompt: Prompt) -> tuple[str, int | None]:
    """The prompt's text with a marker in every special token that its messages spell; the marker's id, or None."""
    tokenizer, messages = tokenizer_of(processor), prompt.messages
    special = SpecialTokens.of(tokenizer)
    if not any(map(special.spelled_by, messages)):
        return prompt_text(processor, prompt), None
    plain = [replace(m, parts=tuple("x" if isinstance(p, str) else p for p in m.parts)) for m in messages]
    marker = choose_marker(tokenizer, prompt_text(processor, replace(prompt, messages=tuple(plain))))
    marked = replace(prompt, messages=tuple(special.insert_marker(message, marker) for message in messages))
    return prompt_text(processor, marked), tokenizer.convert_tokens_to_ids(marker)


def unexpanded_ids(processor: Processor, prompt: Prompt) -> list[int]:
    """Token ids with one placeholder an image, for engines that expand them."""
    text, marker = _escaped_text(processor, prompt)
    tokens = tokenizer_of(processor)(text, add_special_tokens=_adds_special_tokens(processor, text))
    return [i for i in tokens["input_ids"] if i != marker]


def _adds_special_tokens(processor: Processor, text: str) -> bool:
    """Whether the tokenizer must write BOS; some chat templates do."""
    bos = tokenizer_of(processor).bos_token
    return not (bos and text.startswith(bos))


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, *, banned_ids: Sequence[int], stop_ids: Sequence[int]
) -> Tensor:
    """A given text as a response of the policy: its tokens, then the end token.

    Args:
        tokenizer: Of the model; it adds no special tokens here.
        text: Of a demonstration, without an end token.
        banned_ids: Ids the policy never samples: their log-prob would be that of an impossible token.
        stop_ids: Ids that end a response. The tokenizer's end token is appended if it is one of them, else the first.

    Returns:
        int64 (T,), the end token last.

    Raises:
        ValueError: The text holds a banned token or an end token; names the first.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if misplaced := [i for i in ids if i in banned_ids or i in stop_ids]:
        token, ends = tokenizer.convert_ids_to_tokens(misplaced[0]), misplaced[0] in stop_ids
        cause = "ends a response (one is appended here)" if ends else "stands for image content and is never sampled"
        held = f"the response {text[:80]!r} holds the token {token!r}"
        raise ValueError(f"{held}, which {cause}; remove it from the text")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids else stop_ids[0]
    return torch.tensor([*ids, end], dtype=torch.int64)


def extend(inputs: PromptInputs, ids: Sequence[int]) -> PromptInputs:
    """A prompt with text tokens appended, its images unchanged.

    Inputs that run along the tokens (``mm_token_type_ids``) are 0 at text, and so at the new tokens.
    """
    return PromptInputs(
        input_ids_S=torch.cat([inputs.input_ids_S, inputs.input_ids_S.new_tensor(ids)]),
        tokens={name: torch.nn.functional.pad(x, (0, len(ids))) for name, x in inputs.tokens.items()},
        images=inputs.images,
    )


def split_images(features: Mapping[str, Tensor], counts: Sequence[int], axis: ImageAxis) -> list[dict[str, Tensor]]:
    """Vision inputs of each prompt; ``counts`` images a prompt, none gives an empty dict.

    Flat layouts are split by images, and patches by the grid of their image (t·h·w patches each).
    """
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    grids = features.get("image_grid_thw")
    for name, x in features.items():
        if axis == "prompt":
            pieces = list(x.unbind(0))
        elif axis == "patch" and name != "image_grid_thw" and grids is not None:
            patches = [int(g.prod(-1).sum()) for g in grids.split(list(counts))]
            pieces = list(x.split(patches))
        else:
            pieces = list(x.split(list(counts)))
        for part, piece, count in zip(parts, pieces, counts, strict=True):
            if count:
                part[name] = piece
    return parts


def collate(
    inputs: Sequence[PromptInputs], *, pad_id: int, axis: ImageAxis, device: torch.device, side: PaddingSide = "left"
) -> dict[str, Tensor]:
    """One forward input of several prompts: padded tokens (P, S), vision inputs joined in the family's layout."""

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    batch = {
        "input_ids": padded([x.input_ids_S for x in inputs], pad_id),
        "attention_mask": padded([torch.ones_like(x.input_ids_S) for x in inputs], 0),
    }
    for name in inputs[0].tokens:
        batch[name] = padded([x.tokens[name] for x in inputs], 0)
    for name in dict.fromkeys(name for x in inputs for name in x.images):
        pieces = [x.images.get(name) for x in inputs]
        present = [piece for piece in pieces if piece is not None]
        batch[name] = _stack_padded(pieces) if axis == "prompt" else torch.cat(present)
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def _stack_padded(pieces: Sequence[Tensor | None]) -> Tensor:
    """Stack tensors of different sizes with zeros behind; None is all zeros (a prompt without images)."""
    present = [piece for piece in pieces if piece is not None]
    if len(present) == len(pieces) and len({piece.shape for piece in present}) == 1:
        return torch.stack(present)
    shape = [max(sizes) for sizes in zip(*(piece.shape for piece in present), strict=True)]
    stacked = present[0].new_zeros(len(pieces), *shape)
    for row, piece in zip(stacked, pieces, strict=True):
        if piece is not None:
            row[tuple(slice(size) for size in piece.shape)] = piece
    return stacked
