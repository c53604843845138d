"""How to build a reward again in another process: its import path and its constructor arguments, as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import cast

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.isolation.protocol import Json

_TUPLE = "(tuple)"


class NotIsolableError(ValueError):
    """A reward cannot be built again elsewhere; says why and what would help."""


@dataclass(frozen=True)
class RewardSpec:
    """Everything another process needs to build a reward."""

    module: str
    name: str
    args: Json
    kwargs: Json

    @classmethod
    def of(cls, reward: object) -> RewardSpec:
        """How to build this reward."""
        return _spec(reward)

    def build(self) -> BaseReward:
        """The reward, in this process."""
        cls = _find(self.module, self.name)
        args, kwargs = cast("list[object]", _thawed(self.args)), cast("dict[str, object]", _thawed(self.kwargs))
        return cls(*args, **kwargs)  # type: ignore[operator, no-any-return]


def _spec(reward: object) -> RewardSpec:
    """How to build this reward.

    Raises:
        NotIsolableError: It is no ``BaseReward``, its class cannot be imported, or an argument is not plain data.
    """
    cls = type(reward)
    name, module = cls.__qualname__, cls.__module__
    if not hasattr(os, "fork"):
        raise NotIsolableError(f"{name}: processes are copied with fork, which {sys.platform} does not have")
    if not isinstance(reward, BaseReward):
        raise NotIsolableError(f"{name} is no subclass of rllava_pl.rewards.BaseReward, so its arguments are not known")
    if module == "__main__" or "<locals>" in name:
        raise NotIsolableError(f"{name} is written in a script or a function; move it to a file that can be imported")
    try:
        found = _find(module, name)
    except (ImportError, AttributeError) as error:
        raise NotIsolableError(f"{name} cannot be imported from {module!r}: {error}") from error
    if found is not cls:
        raise NotIsolableError(f"{module}.{name} is another class than that of the reward")
    args, kwargs = reward.made_with
    return RewardSpec(module, name, _frozen(list(args), name), _frozen(kwargs, name))


def _find(module: str, name: str) -> object:
    return reduce(getattr, name.split("."), cast(object, import_module(module)))


def _frozen(x: object, name: str) -> Json:
    """Plain data as JSON keeps it; a tuple is marked, so that it comes back as one."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, tuple):
        return {_TUPLE: [_frozen(part, name) for part in x]}
    if isinstance(x, list):
        return [_frozen(part, name) for part in x]
    if isinstance(x, Mapping) and all(isinstance(key, str) for key in x):
        return {key: _frozen(part, name) for key, part in x.items()}
    raise NotIsolableError(
        f"{name} was made with {x!r:.80}; only numbers, texts, lists, tuples and mappings of them reach its process"
    )


def _thawed(x: Json) -> object:
    if isinstance(x, list):
        return [_thawed(part) for part in x]
    if isinstance(x, dict):
        return (
            tuple(map(_thawed, cast("list[Json]", x[_TUPLE])))
            if x.keys() == {_TUPLE}
            else {key: _thawed(part) for key, part in x.items()}
        )
    return x
