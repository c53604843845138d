"""Where the files of a run are, and how their paths are printed."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path:
    """The folder of this run: the logger's, or the Trainer's ``default_root_dir``. Collective."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def shown(path: Path | str) -> str:
    """A path for printing: relative to the working directory if it is inside, else absolute."""
    full = Path(path).absolute()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)
