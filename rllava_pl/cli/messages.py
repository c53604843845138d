"""Error messages about options and classes: one line with the option, what is wrong and the nearest right name.

Keys and class names are compared with the constructors before parsing, because jsonargparse ignores some unknown keys.
Its own errors are trees with a branch for each member of a union; the deepest line is the one that matters.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType

from jsonargparse import ArgumentParser

from rllava_pl.cli.errors import UsageError, nearest
from rllava_pl.cli.raw_config import CLASS, EXTRA, OPTIONS, Value, lookup
from rllava_pl.loop.options import RENAMED
from rllava_pl.modules import PolicyModule

MOVED = {"rllava_pl.strategies.HostAdamW": "rllava_pl.optim.HostAdamW"}
"""Class paths of release 0.1 and what they are now."""
RENAMED_IN_CALLBACKS = {f"canary_{name}": f"sync_check_{name}" for name in ("every", "limit", "recover")}
"""Options of rollout callbacks in release 0.1 and what they are called now; those of algorithms are in ``RENAMED``."""
SHOWN = 14
"""Names are listed where none is near and there are no more than this."""
_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_CLASS = re.compile(r"Problem with given class_path '(?:[^']*\.)?([^'.]+)':$")
_EXPECTED = re.compile(r"Expected an? (?:(?P<path>dot import path)|(?P<type>.+?)(?:\. Got value: .*)?$)")
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Subclass types expect|a class path \(str|"
    r"a dict with|Expected a <class 'NoneType'>|$"
)


def check_keys(source: Value, given: Value, hint: object, path: str, default: type | None = None) -> None:
    """Raise ``UsageError`` for a key or a class that is unknown, or has another name since 0.1.

    ``source`` is what one config file or argument has for the option ``path`` of type ``hint``; ``given`` is what
    everything read so far has there, which names the class. ``default`` is the class if none is named.
    """
    if isinstance(source, list):
        for k, item in enumerate(source):
            check_keys(item, item, hint, f"{path}[{k}]")
        return
    types = set(_members(hint)) - {NoneType}
    bases = [cls for cls in types if cls.__module__ != "builtins" and not issubclass(cls, Enum | Path)]
    plain = types.difference(bases)
    if not bases or not isinstance(source, dict | str) or (plain if isinstance(source, str) else dict in plain):
        return  # a plain value, which the parser checks
    if isinstance(given, list):
        given = given[-1] if given else None
    name = given.get(CLASS) if isinstance(given, dict) else given
    if isinstance(name, str):
        cls = _find_class(name, bases, path)
    else:  # the class of the default, or the only one there is; a section such as ``model`` has none
        cls = default or (bases[0] if len(bases) == 1 and ("." in path or path == "trainer") else None)
    if isinstance(source, str) or cls is None:
        return
    options = options_of(cls)
    renamed = RENAMED if issubclass(cls, PolicyModule) else RENAMED_IN_CALLBACKS
    for key, value in source.items():
        option = key.removesuffix("+")
        if option in options:
            inner = value if key != option else lookup(given, [option])
            check_keys(value, inner, options[option][0], f"{path}.{option}", options[option][1])
        elif option in renamed:
            raise UsageError(f"{path}.{option} is now {path}.{renamed[option]}")
        elif option not in (CLASS, EXTRA):
            raise UsageError(unknown_option(f"{path}.{option}", options, cls.__name__))


def unknown_option(path: str, known: Iterable[str], owner: str = "") -> str:
    """``"model.epss: GRPO has no such option; did you mean 'epochs'?"``."""
    section, _, name = path.rpartition(".")
    names = list(known)
    hint = nearest(name, [*names, *((OPTIONS, CLASS) if owner else ())])
    if not hint:
        few = len(names) <= SHOWN or not owner
        hint = f"; there are {', '.join(names)}" if few else f"; --{section}.help {owner} lists its options"
    return f"{path}: {f'{owner} has' if owner else 'there is'} no such option{hint}"


def explain(message: str, given: Value) -> str:
    """The deepest line of jsonargparse's message, after the option that it is about."""
    found: list[tuple[str, str, str]] = []  # option, class, text
    way: list[tuple[int, str]] = []  # indentation and key of the lines above
    cls = ""
    for line in message.splitlines():
        text, indent = line.strip().removeprefix("- "), len(line) - len(line.lstrip())
        while way and text and way[-1][0] >= indent:
            way.pop()
        if match := _CLASS.match(text):
            cls = match[1]
        elif match := _KEY.search(text):
            way.append((indent, match[1]))
        text = text[match.end() :] if match else text
        if not _NOISE.match(text):
            found.append((".".join(key for _, key in way), cls, text))
    path, cls, text = max(found, key=lambda leaf: len(leaf[0]), default=("", "", " ".join(message.split())))
    if names := text.partition("following arguments are required: ")[2]:
        if path:
            return f"{path}: {cls} needs {names}"
        sections = " and no ".join(name.rpartition(".")[2] for name in names.split(", "))
        return f"no {sections} given; name a config (--config quickstart) or a class (--model GRPO)"
    value = lookup(given, path.split("."))
    value = value.get(CLASS, value) if isinstance(value, dict) else value
    expected = [match for where, _, other in found if where == path and (match := _EXPECTED.match(other))]
    if expected and _EXPECTED.match(text):
        types = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match["type"] or "a class path") for match in expected]
        near = nearest(str(value), re.findall(r"'([^']*)'", text)) if "Literal" in text else ""
        listed = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", " or ".join(dict.fromkeys(types)))
        return f"{path}: expected {listed}, got {value!r}{near}"
    got = f", got {value!r}" if isinstance(value, str) and value not in text else ""
    return f"{path}: {text}{got}" if path else text


@cache
def options_of(cls: type) -> dict[str, tuple[object, type | None]]:
    """Options of a class as the parser finds them: their types, and the class of their default."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    defaults = parser.get_defaults().as_dict()
    named = {name: x.get(CLASS) if isinstance(x, dict) else None for name, x in defaults.items()}
    return {name: (_annotation(cls, name), import_class(path) if path else None) for name, path in named.items()}


def import_class(class_path: str) -> type:
    """The class at a dotted path."""
    module, _, name = class_path.rpartition(".")
    return typing.cast(type, getattr(import_module(module), name))


def _find_class(name: str, bases: Sequence[type], path: str) -> type | None:
    """The class that ``name`` means for an option; None for what the parser must decide."""
    if name in MOVED:
        raise UsageError(f"{path}: {name} is now {MOVED[name]}")
    if name in ("null", "None") or Path(name).is_file():
        return None
    module, _, short = name.rpartition(".")
    if not module:
        fitting = {cls.__name__: cls for base in bases for cls in _subclasses(base)}
        if name in fitting:
            return fitting[name]
        if all(map(dataclasses.is_dataclass, bases)):
            options = ", ".join(key for base in bases for key in options_of(base))
            raise UsageError(f"{path}: expected the options {options}, got {name!r}")
        known = sorted(key for key, cls in fitting.items() if _is_offered(cls))
        listed = f"; there are {', '.join(known)}" if 0 < len(known) <= SHOWN else ""
        own = f"{listed}; name a class of your own with its module, e.g. my_package.{name}"
        raise UsageError(f"{path}: no class is called {name!r}{nearest(name, known) or own}")
    try:
        cls = import_class(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: {name} needs the module {error.name!r}, which is not installed") from error
    except AttributeError as error:
        known = [key for key, x in vars(import_module(module)).items() if inspect.isclass(x) and key[0] != "_"]
        raise UsageError(f"{path}: {module} has no {short!r}{nearest(short, known)}") from error
    return cls if inspect.isclass(cls) else None


def _annotation(owner: type, option: str) -> object:
    """Type of a constructor's option, from the first class in the family that declares it; None if it is unknown."""
    for base in owner.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is not None and option in inspect.signature(constructor).parameters:
            try:
                return typing.get_type_hints(constructor).get(option)
            except NameError:  # an annotation names what is imported for type checkers only
                return None
    return None


def _members(hint: object) -> Iterator[type]:
    """All classes in a type: those of ``list[A | B]`` are A and B, that of ``Callable[[X], A]`` is A."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield str
    elif inspect.isclass(origin) and issubclass(origin, Mapping):
        yield dict
    elif inspect.isclass(hint):
        yield hint
    for argument in arguments if origin is not typing.Literal else ():
        if not isinstance(argument, list):  # what a callable takes
            yield from _members(argument)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _subclasses(subclass)


def _is_offered(cls: type) -> bool:
    """Whether a class can be chosen: public, concrete, and exported if it is one of this package."""
    if cls.__name__.startswith("_") or "<locals>" in cls.__qualname__ or inspect.isabstract(cls):
        return False
    package, name, *_ = (*cls.__module__.split("."), "")
    exported = getattr(import_module(f"{package}.{name}"), "__all__", None) if package == "rllava_pl" else None
    return not getattr(cls, "_is_protocol", False) and (exported is None or cls.__name__ in exported)
