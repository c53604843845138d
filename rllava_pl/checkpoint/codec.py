"""Experience as plain tensors, numbers and text, and back: what a checkpoint may hold and ``weights_only`` loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rllava_pl.types import Experience, ImageSlot, Message, Prompt, PromptInputs, Rollout, Turn

Plain: TypeAlias = "bool | int | float | str | Tensor | list[Plain] | dict[str, Plain] | None"

KIND = "__kind__"
"""Key of the dictionary entry that says what the dictionary stands for."""
CLASSES: Mapping[str, type] = MappingProxyType(
    {cls.__name__: cls for cls in (Experience, Rollout, Prompt, PromptInputs, Message, ImageSlot, Turn)}
)


class Archive:
    """Packs values or unpacks them; what is shared between them (a group's prompt) stays shared, and is stored once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, object]] = {}

    def pack(self, value: object) -> Plain:
        """``value`` as nested plain data.

        Raises:
            TypeError: Something inside is neither plain data nor one of ``CLASSES`` nor a picture.
        """
        if value is None or isinstance(value, (bool, int, float, str, Tensor)):
            return value
        if id(value) not in self._seen:  # the value is kept, so that its id stays its own
            self._seen[id(value)] = (value, self._pack(value))
        return self._seen[id(value)][1]  # type: ignore[return-value]

    def _pack(self, value: object) -> Plain:
        if isinstance(value, (list, tuple)):
            return {KIND: type(value).__name__, "items": [self.pack(item) for item in value]}
        if isinstance(value, Mapping):
            return {KIND: "mapping", "entries": {str(key): self.pack(item) for key, item in value.items()}}
        if isinstance(value, Image.Image):
            return {KIND: "Image", "pixels": torch.from_numpy(np.array(value.convert("RGB")))}
        if type(value).__name__ in CLASSES and dataclasses.is_dataclass(value):
            fields = {f.name: self.pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {KIND: type(value).__name__, **fields}
        raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint")

    def unpack(self, plain: Plain) -> object:
        """The inverse of ``pack``.

        Raises:
            ValueError: A kind that ``pack`` does not write.
        """
        if not isinstance(plain, dict):
            return plain
        if id(plain) not in self._seen:
            self._seen[id(plain)] = (plain, self._unpack(plain))
        return self._seen[id(plain)][1]

    def _unpack(self, plain: dict[str, Plain]) -> object:
        kind = str(plain.get(KIND))
        entries = {key: value for key, value in plain.items() if key != KIND}
        if kind in ("list", "tuple"):
            items = [self.unpack(item) for item in entries["items"]]  # type: ignore[union-attr]
            return items if kind == "list" else tuple(items)
        if kind == "Image":
            return Image.fromarray(entries["pixels"].numpy())  # type: ignore[union-attr]
        if kind == "mapping":  # a level of their own: its keys come from the data and may be any text
            return {key: self.unpack(value) for key, value in entries["entries"].items()}  # type: ignore[union-attr]
        if kind not in CLASSES:
            raise ValueError(f"the checkpoint holds {kind!r}, which this version does not know")
        return CLASSES[kind](**{key: self.unpack(value) for key, value in entries.items()})
