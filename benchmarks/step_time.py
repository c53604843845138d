"""Step time of GRPO on the colour task: this package, a plain PyTorch loop and TRL, in turns on one machine.

    python benchmarks/step_time.py                              # ours, plain and TRL, one thread (`make bench`)
    python benchmarks/step_time.py --competitors ours plain     # without the extra `bench`
    python benchmarks/step_time.py --threads 2 --output step_time.json

One step is 32 prompts x 8 completions sampled and scored, then two updates of 128 completions, on the same checkpoint
(idefics3, 0.24 M parameters, fp32) and the same pictures. ``peers/`` holds the competitors, ``_common.py`` the work.

Each competitor runs in a separate process. They take turns of five steps, so that only one computes at a time, and
all have the same noise; ratios are also taken turn by turn. On a shared machine read the CPU time (of the process with
all its threads), on a quiet one the wall time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _common import Work

PEERS = {"ours": "peers.ours", "plain": "peers.plain", "trl": "peers.trl_trainer"}
CLOCKS = ("cpu_ms", "wall_ms")
PACKAGES = ("torch", "lightning", "transformers", "trl", "tokenizers", "pillow")

Steps = list[dict[str, float]]


@dataclass
class Result:
    """Measurements of one competitor."""

    turns: list[Steps]
    """Of every step: ``cpu_ms``, ``wall_ms``, ``reward`` and, for ours, the phases."""
    peak_rss_mib: float = 0.0

    def all(self, key: str) -> list[float]:
        """One entry of all steps."""
        return [step[key] for turn in self.turns for step in turn]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and, if asked for, write every single time to a JSON file."""
    options = _options(arguments)
    _limit_threads(options.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        work = _work(options, Path(folder))
        results = measure(options.competitors, work, warmup=options.warmup, turns=options.turns, steps=options.steps)
    machine = _machine() | {"load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"}
    print(table(results, machine))
    if options.output:
        report = {
            "options": vars(options),
            "work": {key: value for key, value in asdict(work).items() if key not in ("checkpoint", "output")},
            "machine": machine,
            "ratios": {name: ratios(results["ours"], other) for name, other in _others(results).items()},
            "results": {name: asdict(result) for name, result in results.items()},
        }
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(competitors: Sequence[str], work: Work, *, warmup: int, turns: int, steps: int) -> dict[str, Result]:
    """``turns`` turns of ``steps`` steps for every competitor, after ``warmup`` steps that do not count."""
    results = {name: Result([]) for name in competitors}
    with _started(competitors, work) as connections:
        for name in competitors:
            _take_turn(name, connections[name], warmup)
        for turn in range(turns):
            first = turn % len(competitors)  # the order rotates
            for name in (*competitors[first:], *competitors[:first]):
                answer = _take_turn(name, connections[name], steps)
                results[name].turns.append(answer["steps"])
                results[name].peak_rss_mib = answer["peak_rss_mib"]
        for connection in connections.values():
            connection.send_bytes(b"0")
    return results


def _take_turn(name: str, connection: Connection, steps: int) -> dict[str, Steps | float]:
    """Let a competitor run; the others wait."""
    try:
        connection.send_bytes(str(steps).encode())
        return json.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        raise SystemExit(f"{name} ended early; its output is above") from None


@contextmanager
def _started(competitors: Sequence[str], work: Work) -> Iterator[dict[str, Connection]]:
    """A process a competitor, and the connection to each."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for name in competitors:
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=_compete, args=(name, work, theirs), name=name))
            processes[-1].start()
            theirs.close()  # the child holds the only copy: when it ends, reading here ends
        yield connections
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def _compete(name: str, work: Work, connection: Connection) -> None:
    """Run a competitor; it prints into a file, which is shown if it fails."""
    import torch
    from _common import Pace

    torch.set_num_threads(work.threads)
    screen, log = os.dup(2), Path(work.output) / f"{name}.log"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        importlib.import_module(PEERS[name]).run(work, Pace(connection))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os.write(screen, log.read_bytes())
        raise


# Reporting -----------------------------------------------------------------------------------------------------------


def ratios(ours: Result, theirs: Result) -> dict[str, dict[str, float]]:
    """Of each clock: the ratio of the medians of all steps; median, minimum and maximum of the ratios of each turn."""
    found = {}
    for clock in CLOCKS:
        of_turns = [
            median(step[clock] for step in mine) / median(step[clock] for step in other)
            for mine, other in zip(ours.turns, theirs.turns, strict=True)
        ]
        found[clock] = {
            "of_medians": median(ours.all(clock)) / median(theirs.all(clock)),
            "of_turns": median(of_turns),
            "of_turns_min": min(of_turns),
            "of_turns_max": max(of_turns),
        }
    return found


def table(results: dict[str, Result], machine: dict[str, str]) -> str:
    """A table of times, ratios and phases."""
    columns = f"{'median':>9}{'min':>8}{'max':>8}"
    lines = [f"{'':8}{'CPU, ms a step':>25}{'wall, ms a step':>25}", f"{'':8}{columns}{columns}{'MiB':>7}{'reward':>8}"]
    for name, result in results.items():
        times = [f"{median(x):>9.1f}{min(x):>8.1f}{max(x):>8.1f}" for x in map(result.all, CLOCKS)]
        lines.append(f"{name:8}{''.join(times)}{result.peak_rss_mib:>7.0f}{result.all('reward')[-1]:>8.2f}")
    for name, other in _others(results).items():
        for clock, found in ratios(results["ours"], other).items():
            spread = f"{found['of_turns']:.3f} ({found['of_turns_min']:.2f} to {found['of_turns_max']:.2f})"
            label = f"ours / {name}, {clock.removesuffix('_ms')}"
            lines.append(f"{label:18} ratio of medians {found['of_medians']:.3f}, median ratio of a turn {spread}")
    if "ours" in results:
        phases = [key for key in results["ours"].turns[0][0] if key.startswith("time/")]
        medians = [f"{key[5:].removesuffix('_seconds')} {median(results['ours'].all(key)):.1f}" for key in phases]
        lines.append(f"phases of ours, wall ms: {', '.join(medians)}")
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in machine.items())])


def _others(results: dict[str, Result]) -> dict[str, Result]:
    return {name: result for name, result in results.items() if "ours" in results and name != "ours"}


def _machine() -> dict[str, str]:
    found = {"cores": str(os.cpu_count()), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# Setting up ----------------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--competitors", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, default=1, help="of torch's operators (default 1)")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each before the first that counts (default 5)")
    parser.add_argument("--turns", type=int, default=20, help="turns of each competitor (default 20)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn (default 5)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step (default 32)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--checkpoint", default="", help="keep the model in this directory (default: a temporary one)")
    parser.add_argument("--output", default="", help="JSON file for every single time")
    return parser.parse_args(arguments)


def _limit_threads(threads: int) -> None:
    """Limit threads before a competitor's process loads torch or tokenizers."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def _work(options: argparse.Namespace, folder: Path) -> Work:
    """The work; its checkpoint is built once, unless it exists."""
    from _common import ANSWERS, QUESTION, Work

    from rllava_pl.models import tiny

    checkpoint = Path(options.checkpoint or folder / "checkpoint")
    return Work(
        checkpoint=str(tiny.build(checkpoint, family="idefics3", questions=[QUESTION], answers=ANSWERS)),
        output=str(folder),
        steps=options.warmup + options.turns * options.steps,
        prompts=options.prompts,
        group_size=options.group_size,
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
