"""How to build a reward in another process: its import path and its constructor arguments, as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import cast

from rllava_pl.checkpoint.codec import decode, encode
from rllava_pl.rewards.base import BaseReward
from rllava_pl.types import Json


class NotIsolableError(ValueError):
    """A reward cannot be built in another process; says why and what would help."""


@dataclass(frozen=True)
class RewardSpec:
    """What another process needs to build a reward."""

    path: str
    """``module:Class``."""
    arguments: Json
    """Positional and keyword arguments, as ``codec.encode`` writes them."""

    @classmethod
    def of(cls, reward: object) -> RewardSpec:
        """How to build this reward.

        Raises:
            NotIsolableError: It is no ``BaseReward``, its class cannot be imported, or an argument is not plain data.
        """
        kind = type(reward)
        module, name = kind.__module__, kind.__qualname__
        if not hasattr(os, "fork"):
            raise NotIsolableError(f"{name}: worker processes need fork, which {sys.platform} does not have")
        if not isinstance(reward, BaseReward):
            raise NotIsolableError(f"{name} is no subclass of rllava_pl.rewards.BaseReward, which keeps its arguments")
        if module == "__main__" or "<locals>" in name:
            raise NotIsolableError(f"{name} is defined in a script or a function; move it to a module")
        try:
            found = resolve_name(f"{module}:{name}")
        except (ImportError, AttributeError, ValueError) as error:
            raise NotIsolableError(f"{name} cannot be imported from {module!r}: {error}") from error
        if found is not kind:
            raise NotIsolableError(f"{module}.{name} is another class than that of the reward")
        try:
            encoded = encode(reward.made_with)
        except TypeError:
            encoded = None
        # what is not plain data, or no longer equal, such as a mapping with keys that are not strings
        if encoded is None or encoded["tensors"] or encoded["objects"] or decode(encoded) != reward.made_with:
            raise NotIsolableError(
                f"{name} was made with {reward.made_with!r:.120}; only numbers, strings, lists, tuples and mappings "
                "with string keys can be sent to its process"
            )
        return cls(f"{module}:{name}", encoded["value"])

    def build(self) -> BaseReward:
        """The reward, in this process."""
        arguments = decode({"tensors": [], "objects": [], "value": self.arguments})
        args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", arguments)
        return cast("Callable[..., BaseReward]", resolve_name(self.path))(*args, **kwargs)
