"""What was given in config files and arguments, as one tree: to check it against what was understood.

jsonargparse accepts some mistyped keys in silence (empty sections, options of a nested dataclass on the command line);
a run would then start with a default where another value was meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from rllava_pl.cli.errors import UsageError

Tree = dict[str, "Value"]
Value = str | int | float | bool | None | list["Value"] | Tree

CLASS = "class_path"
OPTIONS = "init_args"
EXTRA = "dict_kwargs"
FLAGS = ("-h", "help", "print_config", "print_shtab")
"""Ends of options that may stand without a value."""


def collect(args: Sequence[str]) -> Tree:
    """Everything that ``args`` say, config files included, later over earlier.

    Options of a class stand beside its ``class_path``; there is no level for ``init_args``:
    ``{"model": {"class_path": "GRPO", "group_size": 4}}``. Values from arguments stay text.
    """
    tree: Tree = {}
    for key, text in _options(args):
        if key in ("--config", "-c"):
            merged = merge(tree, flatten(_load(text)))
            tree = merged if isinstance(merged, dict) else {}
        elif key.startswith("--") and not key.endswith(FLAGS):
            place(tree, key[2:], _value(text))
    return tree


def merge(old: Value, new: Value) -> Value:
    """``new`` over ``old``; a section that names another class starts afresh, a key with a final ``+`` appends."""
    if not isinstance(new, dict):
        return new
    same = isinstance(old, dict) and new.get(CLASS, old.get(CLASS)) == old.get(CLASS)
    merged: Tree = dict(old) if same and isinstance(old, dict) else {}
    for key, value in new.items():
        name = key.removesuffix("+")
        merged[name] = merge(merged.get(name), value) if name == key else _appended(merged.get(name), value)
    return merged


def _appended(before: Value, value: Value) -> Value:
    return [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]


def flatten(value: Value) -> Value:
    """The same without the ``init_args`` levels."""
    if isinstance(value, list):
        return [flatten(item) for item in value]
    if not isinstance(value, dict):
        return value
    options = value.get(OPTIONS)
    beside = {key: inner for key, inner in value.items() if key != OPTIONS}
    lifted = beside | options if isinstance(options, dict) else beside
    return {str(key): flatten(inner) for key, inner in lifted.items()}


def place(tree: Tree, key: str, value: Value) -> None:
    """Set a dotted key as the command line means it: a final ``+`` appends, below a list stands its last item."""
    *parents, last = [part for part in key.split(".") if part != OPTIONS]
    node = tree
    for part in parents:
        node = _section(node, part)
    if last.endswith("+"):
        node[last[:-1]] = _appended(node.get(last[:-1]), value)
    else:
        node[last] = value


def _section(node: Tree, key: str) -> Tree:
    """The section below ``key``; a class that was given by its name alone becomes one."""
    value = node.get(key)
    items = value if isinstance(value, list) and value else None
    section = _as_section(items[-1] if items else value)
    if items:
        items[-1] = section
    else:
        node[key] = section
    return section


def _as_section(value: Value) -> Tree:
    if isinstance(value, dict):
        return value
    return {CLASS: value} if isinstance(value, str) else {}


def unknown(given: Value, parsed: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Paths that were given and are not in the parsed config, each with the names that would be known in its place."""
    if isinstance(given, list) and isinstance(parsed, list) and len(given) == len(parsed):
        for k, (item, understood) in enumerate(zip(given, parsed, strict=True)):
            yield from unknown(item, understood, (*path[:-1], f"{path[-1]}[{k}]"))
    if not isinstance(given, dict) or not hasattr(parsed, "keys"):
        return
    options = children(parsed)
    for key, value in given.items():
        if key in options:
            yield from unknown(value, options[key], (*path, key))
        elif key not in (CLASS, EXTRA):
            yield (*path, key), [*options, OPTIONS]


def children(parsed: object) -> dict[str, object]:
    """Options of a section of the parsed config; those of a class if it is one."""
    section = dict(vars(parsed)) if not isinstance(parsed, dict) else parsed
    if CLASS not in section:
        return section
    inner = section.get(OPTIONS)
    extra = section.get(EXTRA)
    return (children(inner) if inner is not None else {}) | (dict(extra) if isinstance(extra, dict) else {})


def lookup(tree: Value, path: Sequence[str]) -> Value:
    """The value at a path, through the last item of a list; None if nothing was given there."""
    for part in path:
        if isinstance(tree, list) and tree:
            tree = tree[-1]
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of option and value, from ``--key value`` and ``--key=value``.

    Raises:
        UsageError: A word belongs to no option, or an option has no value.
    """
    words = list(args)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("-"):
            raise UsageError(f"{word!r} belongs to no option; options start with --")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals and not key.endswith(FLAGS):
            raise UsageError(f"{key} needs a value, e.g. {key}=...")
        yield key, value


def _load(name: str) -> Tree:
    """A config file, or YAML text in its place."""
    path = Path(name)
    try:
        content = yaml.safe_load(path.read_text("utf-8") if path.is_file() else name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{name}: {where}{error.problem or error}") from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UsageError(f"{name}: {error}") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"{name}: a config has sections (model, data, trainer); this is a {type(content).__name__}")
    return content or {}


def _value(text: str) -> Value:
    """Text as it is, but YAML lists and mappings as such."""
    if text[:1] not in ("[", "{"):
        return text
    try:
        return flatten(yaml.safe_load(text))
    except yaml.YAMLError:
        return text
