"""Prompts, rollouts and batches as plain data, and back: for checkpoints, dumps, and messages between processes.

``encode`` separates a value into three entries: ``tensors``, a list of tensors; ``objects``, a list of JSON values, one
for each dataclass and image; and ``value``, a JSON value that refers to both by position. Tensors, dataclasses and
images that several places share are stored once and are shared again after ``decode``. Only the classes listed here are
ever created, so a file or a message cannot run code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict, cast

import torch
from torch import Tensor

from rllava_pl.types import (
    ImageSlot,
    Json,
    Markup,
    Message,
    Prompt,
    PromptInputs,
    RewardedBatch,
    Rollout,
    ScoredBatch,
    Segment,
    TrainingBatch,
)

Plain: TypeAlias = "bool | int | float | str | Tensor | list[Plain] | tuple[Plain, ...] | Mapping[str, Any] | None"
"""What ``torch.load(..., weights_only=True)`` reads."""

KIND = "kind"
"""Key that says what a dictionary stands for; every JSON object of an encoded value has it."""
_BATCHES = (ScoredBatch, RewardedBatch, TrainingBatch)
_PARTS = (Rollout, Segment, Prompt, PromptInputs, Message, ImageSlot)
CLASSES: Mapping[str, type] = MappingProxyType({cls.__name__: cls for cls in (*_BATCHES, *_PARTS)})


class Encoded(TypedDict):
    """A value as plain data."""

    tensors: list[Tensor]
    """In the order in which they were met."""
    objects: list[Json]
    """Dataclasses and images; each refers to earlier ones only."""
    value: Json
    """The value itself."""


def encode(value: object) -> Encoded:
    """``value`` as plain data.

    Raises:
        TypeError: Something inside is neither plain data, nor a tensor or image, nor an instance of ``CLASSES``.
    """
    encoder = _Encoder()
    return {"value": encoder.node(value), "tensors": encoder.tensors, "objects": encoder.objects}


def decode(plain: Encoded | Plain) -> object:
    """The value that was encoded; mappings come back as dictionaries.

    Raises:
        ValueError: It is nothing that this version of ``encode`` returns.
    """
    try:
        encoded = cast(Encoded, plain)
        decoder = _Decoder(encoded["tensors"])
        for entry in encoded["objects"]:
            decoder.objects.append(decoder.value(entry))
        return decoder.value(encoded["value"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no encoded value of this version: {type(error).__name__}: {error}") from error


class _Encoder:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.objects: list[Json] = []
        self._seen: dict[int, tuple[object, dict[str, Json]]] = {}
        """By id: the value, kept so that its id stays its own, and the reference to it."""

    def node(self, value: object) -> Json:
        if value is None or isinstance(value, bool) or type(value) in (int, float, str):
            return value  # type: ignore[return-value]
        if isinstance(value, int | float):  # numpy's numbers are subclasses that ``weights_only`` refuses
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, str):
            return {KIND: "Markup" if isinstance(value, Markup) else "str", "text": str(value)}
        if isinstance(value, list):
            return [self.node(item) for item in value]
        if isinstance(value, tuple):
            return {KIND: "tuple", "items": [self.node(item) for item in value]}
        if isinstance(value, Mapping):  # its keys come from data and may be any text, also ``kind``
            return {KIND: "mapping", "entries": {str(key): self.node(item) for key, item in value.items()}}
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, self._reference(value))
        return self._seen[id(value)][1]

    def _reference(self, value: object) -> dict[str, Json]:
        from PIL import Image

        if isinstance(value, Tensor):
            self.tensors.append(value)
            return {KIND: "tensor", "index": len(self.tensors) - 1}
        if isinstance(value, Image.Image):
            pixels = torch.frombuffer(bytearray(value.convert("RGB").tobytes()), dtype=torch.uint8)
            entry: Json = {KIND: "Image", "pixels": self.node(pixels.view(value.height, value.width, 3))}
        elif CLASSES.get(type(value).__name__) is type(value):
            fields = dataclasses.fields(value)  # type: ignore[arg-type]
            entry = {KIND: type(value).__name__, "fields": {f.name: self.node(getattr(value, f.name)) for f in fields}}
        else:
            raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint")
        self.objects.append(entry)
        return {KIND: "object", "index": len(self.objects) - 1}


class _Decoder:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.objects: list[object] = []

    def value(self, node: Any) -> object:  # noqa: ANN401  # checked as it is read
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        match kind := node[KIND]:
            case "tensor":
                return self.tensors[node["index"]]
            case "object":
                return self.objects[node["index"]]
            case "str":
                return str(node["text"])
            case "Markup":
                return Markup(node["text"])
            case "tuple":
                return tuple(self.value(item) for item in node["items"])
            case "mapping":
                return {key: self.value(item) for key, item in node["entries"].items()}
            case "Image":
                from PIL import Image

                return Image.fromarray(self.value(node["pixels"]).numpy())  # type: ignore[attr-defined]
        if kind not in CLASSES:
            raise ValueError(f"the encoded value holds {kind!r}, which this version does not support")
        return CLASSES[kind](**{name: self.value(item) for name, item in node["fields"].items()})
