"""Every algorithm learns the colour task: what it reaches, and after how many rollouts.

    python benchmarks/algorithms.py                                # all (`make bench-algorithms`)
    python benchmarks/algorithms.py --methods dapo gspo --seeds 1  # some of them
    python benchmarks/algorithms.py --methods grpo --model.kl.loss_coef=0.01 --output kl.json

A run is `python -m rllava_pl fit --config tiny/colour --config algorithms/<method>`, with `tiny/algorithms/<method>` on
top where the tiny task needs other values than the paper's. Each run has a separate process, is validated every few
rollouts and tested at its end; options that this script does not have are passed to that command. For methods that
learn from demonstrations besides rewards 20 % of the prompts have right ones; they are compared with GRPO, seed by
seed. Count rollouts to compare algorithms; CPU seconds also count validations, and depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "algorithms").glob("*.yaml"))
GUIDED = ("chord", "hpt", "luffy", "srft", "uft")
"""Learn from rewards and from demonstrations."""
SUPERVISED = {"sft": ("accuracy", "nll"), "dpo": ("pair_accuracy", "margin")}
"""Learn from given responses alone: their metrics in validation and test."""
REFERENCE = "grpo"


@dataclass(frozen=True)
class Task:
    """One run to do."""

    method: str
    seed: int
    rollouts: int
    """At most; 0: as many as in the config."""
    every: int
    """Rollouts between validations."""
    stop_at: float
    """Validation accuracy that ends the run; above 1: none does."""
    extra: tuple[str, ...] = ()
    """More options of the training command."""

    @property
    def monitor(self) -> str:
        """The metric that may end the run."""
        return f"val/{SUPERVISED.get(self.method, ('accuracy',))[0]}"

    @property
    def arguments(self) -> list[str]:
        """Of `python -m rllava_pl`."""
        tuned = f"algorithms/{self.method}"
        curve = {"class_path": "_curve.Curve", "init_args": {"monitor": self.monitor, "stop_at": self.stop_at}}
        return [
            *("fit", "--config", "tiny/colour", "--config", tuned),
            *(("--config", f"tiny/{tuned}") if (CONFIGS / "tiny" / f"{tuned}.yaml").exists() else ()),
            f"--seed_everything={self.seed}",
            f"--trainer.callbacks=[{json.dumps(curve)}]",
            f"--trainer.val_check_interval={self.every}",
            *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
            *([f"--model.max_rollouts={self.rollouts}"] if self.rollouts else []),
            *self.extra,
        ]


@dataclass(frozen=True)
class Run:
    """Result of one run."""

    method: str
    seed: int
    rollouts: int
    updates: int
    wall_seconds: float
    """Of the whole process after its imports: building the model, training, validations and the test."""
    cpu_seconds: float
    """Of the same, with all threads."""
    test: dict[str, float]
    """Means over the test split, by name."""
    curve: list[dict[str, float]]
    """Of every validation: ``rollouts`` and ``updates`` so far, and the ``val/`` metrics."""

    def reached(self, level: float, unit: str = "rollouts") -> float:
        """Rollouts (or updates) at the first validation with an accuracy of ``level``; infinite if there was none."""
        return next((point[unit] for point in self.curve if point.get("val/accuracy", 0) >= level), float("inf"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print a table and, if asked for, write every curve to a JSON file."""
    options, extra = _options(arguments)
    _limit_threads(options.threads)
    common = {"rollouts": options.rollouts, "every": options.every, "stop_at": options.stop_at, "extra": tuple(extra)}
    tasks = [Task(method, seed, **common) for method in options.methods for seed in options.seeds]
    runs: list[Run] = []
    for run in measure(tasks, options.processes):
        runs.append(run)
        print(f"{len(runs)} of {len(tasks)}: {line(run.method, [run], options.level)}", flush=True)
        if options.output:  # after every run, so that an interrupted benchmark leaves what it has
            report = {"options": vars(options) | {"extra": extra}, "runs": [asdict(run) for run in runs]}
            Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    print(table(runs, options.level))


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(tasks: Sequence[Task], processes: int) -> Iterator[Run]:
    """The runs, in the order of the tasks, ``processes`` of them at a time, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(train, tasks)


def train(task: Task) -> Run:
    """One run, through the command line; its output is not shown, errors are raised."""
    from rllava_pl.cli import main as command

    wall, cpu = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        log = stack.enter_context(Path(folder, "log").open("w"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        cli = command([*task.arguments, f"--trainer.default_root_dir={folder}"])
        (test,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return Run(
        method=task.method,
        seed=task.seed,
        rollouts=cli.model.state.rollouts,
        updates=cli.model.state.updates,
        wall_seconds=round(time.perf_counter() - wall, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        test={name.removeprefix("test/"): value for name, value in test.items()},
        curve=cli.trainer.callbacks[0].points,
    )


# Reporting -----------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], level: float) -> str:
    """A table with a line a method, its seeds side by side."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    width = 7 * max(len(found) for found in by_method.values())
    head = f"{'':22}{'test accuracy':{width}}  {f'rollouts to {level:g}':{width}}  updates  CPU s a run"
    lines = [head, *(line(method, found, level) for method, found in by_method.items())]
    lines += [compared(method, by_method[method], by_method[REFERENCE], level) for method in _guided(by_method)]
    lines += [objective(method, by_method[method]) for method in SUPERVISED if method in by_method]
    return "\n".join(lines)


def line(method: str, runs: Sequence[Run], level: float) -> str:
    """Seeds side by side; the last two columns are means."""
    accuracies = "".join(f"{run.test['accuracy']:7.3f}" for run in runs)
    reached = "".join(f"{_count(run.reached(level)):>7}" for run in runs)
    updates = _count(mean(run.reached(level, "updates") for run in runs))
    return f"{method:22}{accuracies}  {reached}  {updates:>7}  {mean(run.cpu_seconds for run in runs):5.0f}"


def compared(method: str, runs: Sequence[Run], others: Sequence[Run], level: float) -> str:
    """Rollouts to the level, relative to GRPO with the same seed."""
    of_seed = {run.seed: run.reached(level) for run in others}
    ratios = [run.reached(level) / of_seed[run.seed] for run in runs if run.seed in of_seed]
    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"{method + ' / ' + REFERENCE:22}rollouts to {level:g}, seed by seed: {each}"


def objective(method: str, runs: Sequence[Run]) -> str:
    """The metrics of a supervised method on the test split."""
    names = SUPERVISED[method]
    parts = [f"{name.replace('_', ' ')} {' '.join(f'{run.test[name]:.3f}' for run in runs)}" for name in names]
    return f"{method:22}test {', '.join(parts)}; {mean(run.updates for run in runs):.0f} updates"


def _guided(by_method: Mapping[str, Sequence[Run]]) -> list[str]:
    """Those to be compared with GRPO, if it ran."""
    return [method for method in GUIDED if method in by_method and REFERENCE in by_method]


def _count(number: float) -> str:
    return "never" if number == float("inf") else f"{number:.0f}"


# Setting up ----------------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this script, and the rest, which is passed to the training command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED", help="default: 1 2 3")
    parser.add_argument("--rollouts", type=int, default=0, help="at most (default: as in the config)")
    parser.add_argument("--every", type=int, default=5, help="rollouts between validations (default 5)")
    parser.add_argument("--level", type=float, default=0.9, help="validation accuracy to be reached (default 0.9)")
    parser.add_argument("--stop-at", type=float, default=0.975, help="and to stop at (default 0.975); 2: never")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch's operators in a run (default 1)")
    parser.add_argument("--output", default="", help="JSON file for every result and curve")
    return parser.parse_known_args(arguments)


def _limit_threads(threads: int) -> None:
    """Limit threads before a run's process loads torch or tokenizers; errors are raised there."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RLLAVA_PL_DEBUG": "1",
    }  # raise errors, do not print them


if __name__ == "__main__":
    main()
