"""Configs by name: ``--config quickstart`` finds the same file in a checkout and from an installed wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rllava_pl.cli.errors import UsageError, nearest

SUFFIX = ".yaml"
OPTIONS = ("--config", "-c")


def folder() -> Path:
    """Where the configs stand: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Names of all configs, e.g. ``tiny/colour``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob(f"*{SUFFIX}"))


def listing() -> str:
    """One line a config: its name and the first line of its comment."""
    width = max(map(len, names()))
    lines = [f"{name:{width}} {_title(folder() / (name + SUFFIX))}" for name in names()]
    return "\n".join([*lines, f"\nfiles in {folder()}; several --config merge, the later one wins"])


def find(name: str) -> str:
    """The file called ``name``: a path, or the name of a config with or without ``configs/`` and ``.yaml``.

    What is no file name, a URL or YAML text, comes back as it is.

    Raises:
        UsageError: There is no such file; says which configs there are.
    """
    if Path(name).is_file() or "://" in name or "\n" in name or "{" in name:
        return name
    stem = name.removeprefix("configs/").removesuffix(SUFFIX)
    if stem in names():
        return str(folder() / (stem + SUFFIX))
    hint = nearest(stem, names()) or f" (configs: {', '.join(names())})"
    raise UsageError(f"--config {name}: there is no such file, nor a config of that name{hint}")


def resolve(args: Sequence[str]) -> list[str]:
    """The arguments with the name behind every ``--config`` replaced by its file.

    Raises:
        UsageError: As ``find``.
    """
    resolved, expected = [], False
    for word in args:
        option, equals, value = word.partition("=")
        if expected:
            word = find(word)
        elif equals and option in OPTIONS:
            word = f"{option}={find(value)}"
        expected = not expected and word in OPTIONS
        resolved.append(word)
    return resolved


def _title(path: Path) -> str:
    first = path.read_text("utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
