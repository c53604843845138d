"""The parser's error, which shows every way a value could have been meant, as one line about the likely mistake.

jsonargparse reports errors as an indented tree: a line for each key and class on the way, and at its leaves what is
wrong, once for every member of a Union. Here the leaf that says most is taken, its way gives the key, and the names
that would have been right come from the class that refused. A message in no known form is passed on without its tree.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import product

from rllava_pl.cli.errors import nearest
from rllava_pl.cli.given import CLASS, OPTIONS, Tree, lookup
from rllava_pl.cli.names import below, class_names, option_names

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
    known = option_names(leaf.class_path, group) if leaf.class_path else below(place.options, group)
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
    return unknown_option(path, below(place.options, ".".join(path[:-1])))


def _unknown_class(leaf: Leaf, match: re.Match[str], place: Place) -> str:
    name = match["name"].strip()
    known = class_names(leaf.keys, leaf.class_path, place.roots)
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
    given = lookup(place.given, leaf.keys)  # the parser leaves a name out of messages that it repeats below
    name = match["name"] or (given.get(CLASS) if isinstance(given, dict) else given)
    known = class_names(leaf.keys, leaf.class_path, place.roots)
    listed = f"; there are {', '.join(known)}" if 0 < len(known) <= SHOWN else ""
    return _line(leaf.keys, f"{name} is no {match['base']}{listed}")


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
    (re.compile(r"Import path (?P<name>\S*?) ?does not .+ (?P<base>\w+)$"), _wrong_class),
    (re.compile(r"Not a valid subclass of (?P<base>\w+)\. Got value: (?P<name>.*)"), _wrong_class),
    (re.compile(r"following arguments are required: (?P<names>.+)"), _required),
    (_TYPE, _wrong_type),
    (re.compile(r"Expected a dot import path string: (?P<name>.+)"), _unknown_class),
)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _line(keys: tuple[str, ...], text: str) -> str:
    return f"{'.'.join(keys)}: {text}" if keys else text
