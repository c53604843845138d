"""The results of a run, in one panel and one file."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import rllava_pl
from rllava_pl.callbacks.export import ExportHF
from rllava_pl.callbacks.files import run_directory, shown
from rllava_pl.callbacks.rollout_table import RolloutTable
from rllava_pl.callbacks.splits import batches, split_loaders
from rllava_pl.checkpoint.atomic import write_text
from rllava_pl.loop.evaluation import Scores
from rllava_pl.modules import PolicyModule

_IMPORTED = time.monotonic()


class RunSummary(Callback):
    """Scores the test split before the first rollout and after the last, and summarizes the run.

    The panel and ``summary.json`` in the run's folder contain accuracy and reward before and after, time, memory, and
    the paths of table, checkpoint and export. ``Trainer(limit_test_batches=...)`` limits the part of the test split
    that is scored; 0: none.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def state_dict(self) -> dict[str, object]:
        """The scores before the first rollout, which a resumed run cannot measure."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore these scores."""
        self.before = dict(cast("dict[str, float]", state_dict["before"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the untrained policy."""
        module = cast(PolicyModule, pl_module)
        if module.state.rollouts == 0:
            self.before = score_test_split(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the trained policy."""
        self.after = score_test_split(trainer, cast(PolicyModule, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, after all other callbacks have written their files."""
        directory = run_directory(trainer)  # collective
        if not trainer.is_global_zero:
            return
        module, before, after = cast(PolicyModule, pl_module), self.before, self.after
        record = {
            "accuracy_before": before.get("accuracy"),  # none without a test split or a reward component accuracy
            "accuracy_after": after.get("accuracy"),
            "reward_before": before.get("reward"),
            "reward_after": after.get("reward"),
            "seconds": round(process_seconds(), 3),  # of the last process, if the run was resumed
            "peak_rss_gb": peak_rss_gb(),
            "rollouts": module.state.rollouts,
            "updates": module.state.updates,
            "test_before": before,
            "test_after": after,
            "versions": {
                "python": python_version(),
                **{name: version(name) for name in ("torch", "transformers", "lightning")},
                "rllava_pl": rllava_pl.__version__,
            },
            "paths": paths(trainer, directory),
            "config": config(trainer, module),
        }
        write_text(directory / "summary.json", json.dumps(record, indent=2, default=str) + "\n")
        print_summary(record)


def score_test_split(trainer: Trainer, module: PolicyModule) -> dict[str, float]:
    """Means over the test split, greedy, as ``trainer.test`` would log them; empty without a test split. Collective."""
    if not trainer.limit_test_batches:
        return {}
    scores = Scores(module.device)
    for prompts in batches(split_loaders(trainer.datamodule, "test"), trainer.limit_test_batches):  # type: ignore[attr-defined]
        scores.update(module.evaluator.evaluate(list(prompts), stream="test")[1])
    return scores.compute()


def process_seconds() -> float:
    """Seconds since the start of this process; on systems that do not report it, since the import of this file."""
    since_import = time.monotonic() - _IMPORTED
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return since_import
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22, starttime; field 2 may contain blanks
    return max(since_import, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def peak_rss_gb() -> float | None:
    """Largest resident memory of this process so far in 10^9 bytes; None on systems without ``getrusage``."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 1e9, 3)


def paths(trainer: Trainer, directory: Path) -> dict[str, str]:
    """Paths by kind; only those that exist."""
    found: dict[str, Path | str | None] = {"folder": directory, "config": directory / "config.yaml"}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutTable):
            found["table"] = callback.path
        if isinstance(callback, ExportHF):
            found["export"] = callback.directory
        names = ("last_path", "last_model_path", "best_model_path")
        if checkpoint := next((path for name in names if (path := getattr(callback, name, ""))), ""):
            found["checkpoint"] = checkpoint
    return {kind: str(Path(path).absolute()) for kind, path in found.items() if path and Path(path).exists()}


def config(trainer: Trainer, module: PolicyModule) -> dict[str, object]:
    """The main options of the run; ``config.yaml`` of the command line has all of them."""
    return {
        "algorithm": type(module).__name__,
        "policy": {"class": type(module.policy).__name__, "path": str(module.policy.path)},
        "rewards": [type(reward).__name__ for reward in module.rewards],
        "sampling": asdict(module.sampling),
        "model": dict(module.hparams),
        "data": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
        "trainer": {
            "strategy": type(trainer.strategy).__name__,
            "accelerator": type(trainer.accelerator).__name__,
            "ranks": trainer.world_size,
            "precision": str(trainer.precision),
        },
    }


def print_summary(record: Mapping[str, Any]) -> None:
    """Print the panel, and below it the next commands, unwrapped so that they can be copied."""
    folder, peak = record["paths"]["folder"], record["peak_rss_gb"]
    facts = {
        "test accuracy": _change(record["accuracy_before"], record["accuracy_after"]),
        "test reward": _change(record["reward_before"], record["reward_after"]),
        "rollouts": f"{record['rollouts']}, {record['updates']} updates",
        "time": f"{record['seconds']:.0f} s from command to summary",
        "peak memory": "" if peak is None else f"{peak:.2f} GB",
    }
    for kind, path in record["paths"].items():
        inside = path != folder and Path(path).is_relative_to(folder)
        facts[kind] = str(Path(path).relative_to(folder)) if inside else shown(path)
    grid = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        if value:
            grid.add_row(Text(label, style="dim"), Text(value, overflow="fold"))
    console = get_console()
    console.print(Panel(grid, title=f"{record['config']['algorithm']} is done", title_align="left", expand=False))
    for label, command in next_commands(record["paths"]).items():
        console.print(Text.assemble((f"{label}: ", "dim"), command), soft_wrap=True)


def _change(before: float | None, after: float | None) -> str:
    """``0.167 → 0.953 (+0.786)``; without ``before`` only the second number."""
    if after is None:
        return ""
    return f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f} ({after - before:+.3f})"


def next_commands(paths: Mapping[str, str]) -> dict[str, str]:
    """Commands to run next; those whose files do not exist are left out."""
    quoted = {kind: shlex.quote(shown(path)) for kind, path in paths.items()}
    commands = {}
    if {"config", "checkpoint"} <= paths.keys():
        resume = f"--config {quoted['config']} --ckpt_path {quoted['checkpoint']}"
        commands["test again"] = f"python -m rllava_pl test {resume}"
    if any(Path(paths["folder"]).glob("events.out.tfevents.*")):
        commands["curves"] = f"tensorboard --logdir {quoted['folder']}"
    if "export" in paths:
        commands["load it"] = f"AutoModelForImageTextToText.from_pretrained({shown(paths['export'])!r})"
    return commands
