"""Configs by name: ``--config quickstart`` finds the same file in a checkout and in an installed wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rllava_pl.cli.errors import UsageError, command_parser, nearest

SUFFIX = ".yaml"
CONFIG = ("--config", "-c")


def folder() -> Path:
    """Where the configs are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Names of all configs, e.g. ``tiny/colour``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob(f"*{SUFFIX}"))


def run(args: Sequence[str]) -> int:
    """Print one line for each config: its name and the first line of its comment."""
    command_parser("configs", "List the configs that --config finds by name.\n").parse_args(args)
    width = max(map(len, names()))
    for name in names():
        first, *_ = (folder() / (name + SUFFIX)).read_text("utf-8").splitlines() or [""]
        print(f"{name:{width}} {first.lstrip('# ') if first.startswith('#') else ''}")
    print(f"\nfiles in {folder()}; several --config are merged, later ones win")
    return 0


def find(name: str) -> str:
    """The file called ``name``: a path, or the name of a config with or without ``configs/`` and ``.yaml``.

    A URL or YAML text is returned as it is. An unknown name is a ``UsageError`` with the configs that exist.
    """
    if Path(name).is_file() or "://" in name or "\n" in name or "{" in name:
        return name
    stem = name.removeprefix("configs/").removesuffix(SUFFIX)
    if stem in names():
        return str(folder() / (stem + SUFFIX))
    hint = nearest(stem, names()) or f" (configs: {', '.join(names())})"
    raise UsageError(f"--config {name}: there is no such file, nor a config of that name{hint}")


def resolve(args: Sequence[str]) -> list[str]:
    """The arguments with the name after every ``--config`` replaced by its file."""
    words = list(args)
    for k, word in enumerate(args):
        option, equals, value = word.partition("=")
        if k and args[k - 1] in CONFIG:
            words[k] = find(word)
        elif equals and option in CONFIG:
            words[k] = f"{option}={find(value)}"
    return words
