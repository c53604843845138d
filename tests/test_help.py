"""Every option of every exported class has a help text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import pytest
from jsonargparse import ArgumentParser

PACKAGES = (
    "modules",
    "models",
    "datamodules",
    "callbacks",
    "rewards",
    "rollout",
    "strategies",
    "optim",
    "loop.options",
)


def exported() -> Iterator[type]:
    """Classes that a config can name, and the option groups."""
    for package in PACKAGES:
        module = import_module(f"rllava_pl.{package}")
        names = getattr(module, "__all__", None) or [n for n, x in vars(module).items() if is_own(x, module.__name__)]
        for name in names:
            member = getattr(module, name)
            if inspect.isclass(member) and is_option(member):
                yield member


def is_own(member: object, module: str) -> bool:
    return inspect.isclass(member) and member.__module__ == module


def is_option(cls: type) -> bool:
    """Whether a config can construct the class; results, errors and protocols are made or implemented elsewhere."""
    results = issubclass(cls, BaseException | tuple) or cls.__name__ in ("Rejection", "RewardOutput")
    return not results and not getattr(cls, "_is_protocol", False)


def without_help(cls: type) -> list[str]:
    """Options of the parser of a class that have no text, but those of Lightning's constructors."""
    own = [base for base in cls.__mro__ if not base.__module__.startswith(("lightning", "torch", "builtins"))]
    declared = {n for base in own if "__init__" in vars(base) for n in inspect.signature(base.__init__).parameters}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    options = [action for action in parser._actions if action.dest.partition(".")[0] in declared]
    return [action.dest for action in options if not action.help]


CLASSES = sorted(set(exported()), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_option_has_a_help_text(cls):
    assert without_help(cls) == []


def test_missing_help_text_is_found():
    class Bare:
        """A class with one documented option.

        Args:
            known: Text.
        """

        def __init__(self, known: int = 0, unknown: int = 0) -> None: ...

    assert without_help(Bare) == ["unknown"]
