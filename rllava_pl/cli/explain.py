"""The parser's error, which shows every way a value could have been meant, as one line about the likely mistake.

jsonargparse reports errors as an indented tree: a line for each key and class on the way, and at its leaves what is
wrong, once for every member of a Union. Here the leaf that says most is taken, its way gives the key, and the names that
would have been right come from the class that refused. A message that is not understood is passed on without its tree.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import product

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from rllava_pl.cli.errors import nearest
from rllava_pl.cli.given import CLASS, OPTIONS, Tree, lookup

SHOWN = 14
"""So many names are listed where none is near."""

_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_CALLABLE = re.compile(r"Type .+ expects a function or a callable class: ")
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Subclass types expect|"
    r"a class path \(str\)|a dict with|a dict without|Expected a <class 'NoneType'>|$"
)
_TYPE = re.compile(r"Expected an? (?!dot import)(?P<type>.+?)(\. Got value: (?P<value>.*))?$")
_PLAIN = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
}


@dataclass(frozen=True)
class Leaf:
    """What is wrong, and where."""

    text: str
    keys: tuple[str, ...]
    """Way to it, without the ``init_args`` levels."""
    class_path: str
    """The class that refused, if any."""
    depth: int
    """Keys and classes on the way."""


@dataclass(frozen=True)
class Place:
    """What the explanations draw on besides the leaf."""

    given: Tree
    roots: Mapping[str, type]
    """Base classes of the top-level sections that hold a class: ``{"model": RLModule}``."""
    options: list[str] = field(default_factory=list)
    """Options of the command, e.g. ``trainer.max_epochs``."""
    found: tuple[Leaf, ...] = ()
    """All leaves of this message."""


def explain(message: str, place: Place) -> str:
    """One line that names the key, what is wrong with it and the nearest right names."""
    found = tuple(leaves(message))
    place = replace(place, found=found)
    for depth in sorted({leaf.depth for leaf in found}, reverse=True):  # the deepest came closest to what was meant
        level = [leaf for leaf in found if leaf.depth == depth]
        for (pattern, tell), leaf in product(_RULES, level):
            if match := pattern.search(leaf.text):
                return tell(leaf, match, place)
    return _line(found[0].keys, found[0].text) if found else " ".join(message.split())


def leaves(message: str) -> Iterator[Leaf]:
    """The ends of the tree, in order."""
    way: list[tuple[int, str, str]] = []  # indentation, kind, name
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        while way and way[-1][0] >= indent and text:
            way.pop()
        text = _CALLABLE.sub("", text)
        if match := _KEY.match(text):
            way.append((indent, "key", match[1]))
            text = text[match.end() :]
        elif match := _CLASS.match(text):
            way.append((indent, "class", match[1]))
            text = text[match.end() :]
        if not _NOISE.match(text):
            classes = [name for _, kind, name in way if kind == "class"]
            named = re.search(r"class_path='([^']+)'", text)  # callables put their class at the end of the line
            keys = ".".join(name for _, kind, name in way if kind == "key").split(".")
            class_path = named[1] if named else classes[-1] if classes else ""
            yield Leaf(text, tuple(key for key in keys if key), class_path, len(way))


# One function a kind of mistake --------------------------------------------------------------------------------------


def _unknown_option(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    """``name`` is dotted when options were given below the unknown one; ``group`` is a section without a class."""
    group = match["group"]
    keys = (*leaf.keys, group) if group else leaf.keys
    known = option_names(leaf, group, place)
    section = lookup(place.given, keys)
    named = section.get(CLASS) if isinstance(section, dict) else None
    owner = "" if group else _short(named if isinstance(named, str) else leaf.class_path)
    return unknown_option((*keys, match["name"].split(".")[0]), known, owner)


def unknown_option(path: tuple[str, ...], known: list[str], owner: str = "") -> str:
    """``"model.epss: GRPO has no such option; did you mean 'epochs'?"``."""
    hint = nearest(path[-1], [*known, *((OPTIONS, CLASS) if owner else ())])
    if not hint and len(known) <= SHOWN:
        hint = f"; there are {', '.join(known)}" if known else ""
    if not hint and owner:
        hint = f"; --{'.'.join(path[:-1])}.help {owner} lists its options"
    return _line(path, f"{owner or 'there'} {'has' if owner else 'is'} no such option{hint}")


def _unknown_trainer_option(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    path = tuple(match["name"].split("."))
    section = "".join(f"{part}." for part in path[:-1])
    known = {option.removeprefix(section).split(".")[0] for option in place.options if option.startswith(section)}
    return unknown_option(path, sorted(known))


def _unknown_class(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    name = match["name"].strip()
    known = class_names(leaf, place)
    hint = nearest(_short(name), known)
    if not hint:
        listed = f"; there are {', '.join(known)}" if 0 < len(known) <= SHOWN else ""
        hint = f"{listed}; name a class of your own with its module, e.g. my_package.{_short(name)}"
    return _line(leaf.keys, f"no class is called {name!r}{hint}")


def _unknown_attribute(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    module = import_module(match["module"])
    known = [name for name, x in vars(module).items() if inspect.isclass(x) and not name.startswith("_")]
    return _line(leaf.keys, f"{match['module']} has no {match['name']!r}{nearest(match['name'], known)}")


def _unknown_module(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    return _line(leaf.keys, f"there is no module {match['name']!r}, which {leaf.class_path!r} names; is it installed?")


def _wrong_class(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    known = class_names(leaf, place)
    listed = f"; there are {', '.join(known)}" if 0 < len(known) <= SHOWN else ""
    return _line(leaf.keys, f"{match['name']} is no {match['base']}{listed}")


def _required(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    names = [name.rpartition(".")[2] for name in match["names"].split(", ")]
    if not leaf.keys:
        return f"no {' and no '.join(names)} given; name a config (--config quickstart) or a class (--model GRPO)"
    return _line(leaf.keys, f"{_short(leaf.class_path)} needs {' and '.join(names)}")


def _wrong_type(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    value = match["value"] if match["value"] is not None else lookup(place.given, leaf.keys)
    choices = re.findall(r"'([^']*)'", match["type"]) if "Literal" in match["type"] else []
    if choices:
        return _line(leaf.keys, f"{value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}")
    rivals = [_TYPE.search(rival.text) for rival in place.found if rival.keys == leaf.keys]
    expected = dict.fromkeys(_plain(rival["type"]) for rival in rivals if rival)
    return _line(leaf.keys, f"expected {' or '.join(expected)}, got {value!r}")


def _plain(type_name: str) -> str:
    """``<class 'int'>`` -> ``an integer``."""
    word = re.search(r"(\w+)'?>?$", type_name)
    return _PLAIN.get(word[1], type_name) if word else type_name


Rule = Callable[[Leaf, re.Match[str], Place], str]
_RULES: tuple[tuple[re.Pattern[str], Rule], ...] = (
    (re.compile(r"Option '(?P<name>[^']+)' is not accepted(?P<group>)"), _unknown_option),
    (re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"), _unknown_option),
    (re.compile(r"Subcommand '\w+' does not accept option '(?P<name>[^']+)'"), _unknown_trainer_option),
    (re.compile(r"unrecognized arguments: -*(?P<name>[^\s=]+)"), _unknown_trainer_option),
    (re.compile(r"Expected a dot import path string: (?P<name>[A-Z].*)"), _unknown_class),
    (re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'"), _unknown_attribute),
    (re.compile(r"No module named '(?P<name>[^']+)'"), _unknown_module),
    (re.compile(r"Import path (?P<name>\S+) does not .+ (?P<base>\w+)$"), _wrong_class),
    (re.compile(r"Not a valid subclass of (?P<base>\w+)\. Got value: (?P<name>.*)"), _wrong_class),
    (re.compile(r"following arguments are required: (?P<names>.+)"), _required),
    (_TYPE, _wrong_type),
    (re.compile(r"Expected a dot import path string: (?P<name>.+)"), _unknown_class),
)


# Names that would have been right ------------------------------------------------------------------------------------


def option_names(leaf: Leaf, group: str, place: Place) -> list[str]:
    """Options of the class that refused, or of a section of it; of the command if there is no class."""
    if leaf.class_path:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(import_class(leaf.class_path), fail_untyped=False)
        options = [str(key) for key in parser.get_defaults().keys()]  # noqa: SIM118 - its keys() are dotted
    else:
        options = place.options
    prefix = f"{group}." if group else ""
    names = dict.fromkeys(option.removeprefix(prefix).split(".")[0] for option in options if option.startswith(prefix))
    return list(names)


def class_names(leaf: Leaf, place: Place) -> list[str]:
    """Short names of the classes that fit where this leaf stands."""
    section, _, option = ".".join(leaf.keys).rpartition(".")
    if leaf.class_path and leaf.keys and not _is_root(leaf, place):
        hint = _annotation(import_class(leaf.class_path), leaf.keys[-1])
    elif section == "trainer":
        hint = _annotation(Trainer, option)
    else:
        hint = place.roots.get(leaf.keys[0]) if leaf.keys else None
    names = {name for base in _classes(hint) for name in _subclasses(base)}
    return sorted(names - {root.__name__ for root in place.roots.values()})


def _is_root(leaf: Leaf, place: Place) -> bool:
    return len(leaf.keys) == 1 and leaf.keys[0] in place.roots


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
    if typing.get_origin(hint) is not None and isinstance(arguments[:1], tuple) and isinstance(arguments[0], list):
        arguments = arguments[1:]  # what a callable takes
    for argument in arguments:
        yield from _classes(argument)
    if inspect.isclass(hint) and not arguments and hint.__module__ != "builtins":
        yield hint


def _subclasses(base: type) -> Iterator[str]:
    public = not base.__name__.startswith("_") and "<locals>" not in base.__qualname__
    if public and not inspect.isabstract(base) and not getattr(base, "_is_protocol", False):
        yield base.__name__
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _subclasses(subclass)


def import_class(class_path: str) -> type:
    """The class at a dotted path."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _line(keys: tuple[str, ...], text: str) -> str:
    return f"{'.'.join(keys)}: {text}" if keys else text
