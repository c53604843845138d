"""The names a key or a class could have had, read from the constructors' annotations."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer


def option_names(class_path: str, group: str = "") -> list[str]:
    """Options of a class, or of one of its sections that is no class path of its own (``sampling``)."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(import_class(class_path), fail_untyped=False)
    return below([str(key) for key in parser.get_defaults().keys()], group)  # noqa: SIM118 - its keys() are dotted


def below(options: Iterable[str], section: str) -> list[str]:
    """Names directly below a section of dotted options: ``trainer`` has ``logger`` of ``trainer.logger.name``."""
    prefix = f"{section}." if section else ""
    return list(dict.fromkeys(o.removeprefix(prefix).split(".")[0] for o in options if o.startswith(prefix)))


def class_names(keys: Sequence[str], owner: str, roots: Mapping[str, type]) -> list[str]:
    """Short names of the classes that fit a key.

    Args:
        keys: Way to the key, e.g. ``("model", "policy")``.
        owner: Class path of the object whose option it is; empty for a top-level section.
        roots: Base classes of the top-level sections, which are not named themselves.
    """
    *section, option = ".".join(keys).split(".")
    hint: object
    if not section and option in roots:
        hint = roots[option]
    elif owner:
        hint = _annotation(import_class(owner), option)
    else:
        hint = _annotation(Trainer, option) if section == ["trainer"] else None
    names = {name for base in _classes(hint) for name in _subclasses(base)}
    return sorted(names - {root.__name__ for root in roots.values()})


def import_class(class_path: str) -> type:
    """The class at a dotted path."""
    module, _, name = class_path.rpartition(".")
    cls: type = getattr(import_module(module), name)
    return cls


def _annotation(owner: type, option: str) -> object:
    """Type of a constructor's option, from the first class in the family that declares it."""
    for base in owner.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is not None and option in inspect.signature(constructor).parameters:
            return typing.get_type_hints(constructor).get(option)
    return None


def _classes(hint: object) -> Iterator[type]:
    """All classes in a type: those of ``list[A | B]`` are A and B, that of ``Callable[[X], A]`` is A."""
    arguments = typing.get_args(hint)
    for argument in arguments:
        if not isinstance(argument, list):  # what a callable takes
            yield from _classes(argument)
    if inspect.isclass(hint) and not arguments and hint.__module__ != "builtins":
        yield hint


def _subclasses(base: type) -> Iterator[str]:
    public = not base.__name__.startswith("_") and "<locals>" not in base.__qualname__
    if public and _exported(base) and not inspect.isabstract(base) and not getattr(base, "_is_protocol", False):
        yield base.__name__
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _subclasses(subclass)


def _exported(cls: type) -> bool:
    """Whether a class of this package is there to be chosen; what its room keeps to itself is what others build on."""
    package, room, *_ = (*cls.__module__.split("."), "")
    shown = getattr(import_module(f"{package}.{room}"), "__all__", None) if package == "rllava_pl" else None
    return shown is None or cls.__name__ in shown
