"""Config files and arguments as the user wrote them, before the parser has interpreted them.

Options of a class stand beside its ``class_path``, without a level for ``init_args``:
``{"model": {"class_path": "GRPO", "group_size": 4}}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import yaml

from rllava_pl.cli.configs import CONFIG
from rllava_pl.cli.errors import UsageError

Tree = dict[str, "Value"]
Value = str | int | float | bool | None | list["Value"] | Tree

CLASS = "class_path"
OPTIONS = "init_args"
EXTRA = "dict_kwargs"
FLAGS = ("-h", "help", "print_config", "print_shtab")
"""Ends of arguments that may stand without a value, and are no options of the run."""


def sources(args: Sequence[str]) -> Iterator[Tree]:
    """One tree for each config file and each argument, in order; values of arguments stay text."""
    words = list(args)
    while words:
        word = words.pop(0)
        key, equals, text = word.partition("=")
        if not key.startswith("-"):
            raise UsageError(f"{word!r} is not an option; options start with --")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and not key.endswith(FLAGS):
            raise UsageError(f"{key} needs a value, e.g. {key}=...")
        if key in CONFIG:
            yield _load(text)
        elif not key.endswith(FLAGS):
            path = [part for part in key.removeprefix("--").split(".") if part != OPTIONS]
            yield reduce(lambda inner, part: {part: inner}, reversed(path), _parse(text))  # type: ignore[arg-type, return-value]


def merge(old: Value, new: Value) -> Value:
    """``new`` over ``old``, as the parser merges them.

    Options of a class that is replaced by another one are kept. A key with a final ``+`` appends to a list; options
    below a list belong to its last item.
    """
    if not isinstance(new, dict):
        named = isinstance(new, str) and isinstance(old, dict) and CLASS in old
        return {**old, CLASS: new} if named else new  # type: ignore[dict-item]
    if isinstance(old, list) and old:
        return [*old[:-1], merge(old[-1], new)]
    merged: Tree = dict(old) if isinstance(old, dict) else {CLASS: old} if isinstance(old, str) else {}
    for key, value in new.items():
        name = key.removesuffix("+")
        if name == key:
            merged[name] = merge(merged.get(name), value)
        else:
            before, added = merged.get(name), value if isinstance(value, list) else [value]
            merged[name] = [*(before if isinstance(before, list) else []), *added]
    return merged


def lookup(tree: Value, path: Sequence[str]) -> Value:
    """The value at a path, through the last item of a list; None if there is none."""
    for part in path:
        if isinstance(tree, list) and tree:
            tree = tree[-1]
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _flatten(value: Value) -> Value:
    """Lift ``init_args`` to the level of ``class_path``."""
    if isinstance(value, list):
        return [_flatten(item) for item in value]
    if not isinstance(value, dict):
        return value
    options = value.get(OPTIONS)
    lifted = {**value, **options} if isinstance(options, dict) else dict(value)
    lifted.pop(OPTIONS, None)
    return {str(key): _flatten(inner) for key, inner in lifted.items()}


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
    return _flatten(content or {})  # type: ignore[return-value]


def _parse(text: str) -> Value:
    """Text as it is, YAML lists and mappings parsed."""
    try:
        return _flatten(yaml.safe_load(text)) if text[:1] in ("[", "{") else text
    except yaml.YAMLError:
        return text
