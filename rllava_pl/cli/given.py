"""What was given in config files and arguments, as one tree: to check it against what was understood.

jsonargparse accepts some mistyped keys in silence (empty sections, options of a nested dataclass on the command line); a
run would then start with a default where another value was meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

Tree = dict[str, "Value"]
Value = str | int | float | bool | None | list["Value"] | Tree

CLASS = "class_path"
OPTIONS = "init_args"
EXTRA = "dict_kwargs"


def collect(args: Sequence[str]) -> Tree:
    """Everything that ``args`` say, config files included, later over earlier.

    Options of a class stand beside its ``class_path``; there is no level for ``init_args``:
    ``{"model": {"class_path": "GRPO", "group_size": 4}}``. Values from arguments stay text.
    """
    tree: Tree = {}
    for key, text in _options(args):
        if key in ("--config", "-c"):
            tree = merge(tree, flatten(_load(text)))
        elif key.startswith("--"):
            place(tree, key[2:], _value(text))
    return tree


def merge(old: Value, new: Value) -> Value:
    """``new`` over ``old``; a section that names another class starts afresh."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if new.get(CLASS, old.get(CLASS)) != old.get(CLASS):
        return new
    return old | {key: merge(old.get(key), value) for key, value in new.items()}


def flatten(value: Value) -> Value:
    """The same without the ``init_args`` levels."""
    if isinstance(value, list):
        return [flatten(item) for item in value]
    if not isinstance(value, dict):
        return value
    options = value.get(OPTIONS)
    lifted = {key: inner for key, inner in value.items() if key != OPTIONS} | (options if isinstance(options, dict) else {})
    return {str(key): flatten(inner) for key, inner in lifted.items()}


def place(tree: Tree, key: str, value: Value) -> None:
    """Set a dotted key as the command line means it: a trailing ``+`` appends, options follow the last item of a list."""
    *parents, last = [part for part in key.split(".") if part != OPTIONS]
    node = tree
    for part in parents:
        node = _section(node, part)
    if last.endswith("+"):
        items = node.get(last[:-1])
        node[last[:-1]] = [*(items if isinstance(items, list) else []), *(value if isinstance(value, list) else [value])]
    else:
        node[last] = value


def _section(node: Tree, key: str) -> Tree:
    """The section below ``key``; a class that was given by its name alone becomes one."""
    value = node.get(key)
    if isinstance(value, list) and value:
        value[-1] = _as_section(value[-1])
        return value[-1]
    node[key] = _as_section(value)
    return node[key]


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
            yield (*path, key), list(options)


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
    """Pairs of option and value, from ``--key value`` and ``--key=value``."""
    words = list(args)
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("-"):
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        yield key, value


def _load(name: str) -> Value:
    """A config file; what cannot be read is left to the parser, whose message is better."""
    try:
        return yaml.safe_load(Path(name).read_text("utf-8") if Path(name).is_file() else name) or {}
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}


def _value(text: str) -> Value:
    """Text as it is, but YAML lists and mappings as such."""
    if text[:1] not in ("[", "{"):
        return text
    try:
        return flatten(yaml.safe_load(text))
    except yaml.YAMLError:
        return text
