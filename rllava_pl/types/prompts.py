"""Prompts: conversations with pictures, as data gives them and as a model reads them; how responses are sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["system", "user", "assistant", "tool"]
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value as it stood in the data."""


@dataclass(frozen=True)
class ImageSlot:
    """The place of the prompt's next image inside a message."""


IMAGE = ImageSlot()
"""The one image slot; ``Message("user", (IMAGE, "Which digit is it?"))``."""


class Markup(str):
    """Text in which special tokens of the model are meant; in plain ``str`` they are only spelled, and stay text.

    Example: ``Message("user", (IMAGE, Markup("Find <|object_ref_start|>the cat<|object_ref_end|>.")))``. Tokens that
    stand for pictures stay text here, too: a picture is an image slot.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Message:
    """One message of a conversation, images as slots.

    Example: ``Message("user", (IMAGE, "Which digit is it?"))``.
    """

    role: Role
    """Who speaks."""
    parts: tuple[str | ImageSlot, ...]
    """Text and image slots in reading order; the k-th slot of a prompt stands for its k-th image."""

    @classmethod
    def parse(cls, role: Role, text: str, slot: str = "<image>") -> Message:
        """Split ``text`` at every ``slot``: ``parse("user", "<image>Which?")`` has the parts ``(IMAGE, "Which?")``."""
        pieces = text.split(slot)
        parts: list[str | ImageSlot] = [pieces[0]]
        for piece in pieces[1:]:
            parts += [IMAGE, piece]
        return cls(role, tuple(part for part in parts if part != ""))

    @property
    def image_slots(self) -> int:
        """Number of images this message shows."""
        return sum(isinstance(part, ImageSlot) for part in self.parts)


@dataclass(frozen=True)
class Prompt:
    """An initial state of the decision process: a conversation that waits for the policy's answer.

    Example: ``Prompt("digits:17", (Message("user", (IMAGE, "Which digit is it?")),), images=(scan,), answer="4")``.
    """

    uid: str
    """Identifies the row (same text, same images), unique in its dataset; seeds derive from it, not from content."""
    messages: tuple[Message, ...]
    """The conversation so far; the last message is not the assistant's."""
    images: tuple[Image, ...] = ()
    """Decoded RGB images, one for every image slot, in the order of the slots."""
    answer: Json = None
    """What the rewards compare with, as it stood in the data; None where a task needs none."""
    target: str = ""
    """A response worth imitating: SFT target, demonstration beside rollouts, chosen one of a preference pair."""
    rejected: str = ""
    """The worse response of a preference pair; ``target`` is the better one."""
    metadata: Mapping[str, Json] = field(default_factory=dict)
    """Further columns of the row, as they stood in the data; for rewards, environments and tables."""
    source: str = ""
    """Where the row stands (file and row number), for error messages."""

    @property
    def answer_text(self) -> str:
        """The answer as text: a string as it is, None as "", any other value in JSON."""
        if self.answer is None:
            return ""
        return self.answer if isinstance(self.answer, str) else json.dumps(self.answer, ensure_ascii=False)


Item = TypeVar("Item")


class Batch(Generic[Item]):
    """An immutable sequence that Lightning passes on untouched.

    It is deliberately no list and no dataclass: Lightning walks through collections to move and cast tensors, and
    refuses frozen dataclasses on the way. ``None`` entries (the padding that keeps ranks in step) are dropped.
    """

    def __init__(self, items: Iterable[Item | None]) -> None:
        self._items = tuple(item for item in items if item is not None)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)


class PromptBatch(Batch[Prompt]):
    """The prompts of one rollout, as a data loader hands them to ``training_step``.

    Use it as ``collate_fn``: ``DataLoader(prompts, 32, collate_fn=PromptBatch)``.
    """


@dataclass(frozen=True)
class PromptInputs:
    """One prompt as the model reads it: token ids and image tensors, without padding."""

    input_ids_S: Tensor
    """int64 (S,); every image placeholder expanded to its number of image tokens."""
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs that run along the tokens, (S,) each; e.g. ``mm_token_type_ids``."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """Vision inputs of this prompt alone, in the layout of its family; empty without images. E.g. ``pixel_values``."""

    def __len__(self) -> int:
        return len(self.input_ids_S)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: softmax of logits / temperature over the allowed tokens.

    The trainer's log-probs are defined by the same numbers, so what cannot be mirrored there is refused here.

    Args:
        max_tokens: Response budget in tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only 1.0: a truncated distribution is not the one whose log-probs are trained.
        top_k: Only 0 (all tokens), for the same reason.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {self.max_tokens}; a response needs a budget of at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; use 0 (greedy) or a positive number")
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"sampling.top_p={self.top_p}, top_k={self.top_k}: truncated sampling draws from another distribution "
                "than the one whose log-probs are trained, which biases every update; use top_p=1.0 and top_k=0"
            )
