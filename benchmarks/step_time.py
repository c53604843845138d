"""Step time of GRPO on the colour task: this package, a plain PyTorch loop, TRL; in turns, on one machine.

    python benchmarks/step_time.py                      # ours, plain and TRL (needs the extra `bench`), one thread
    python benchmarks/step_time.py --competitors ours plain --threads 2 --output step_time.json

One step is 32 prompts x 8 completions sampled and scored, and two updates of 128 completions. Each competitor lives in a
process of its own; they take turns in blocks of a few steps, so that only one computes at a time and all meet the same
noise. Ratios are taken within a round. On a busy machine read the CPU time, on a quiet one the wall time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _common import Work

PEERS = {"ours": "peers.ours", "plain": "peers.plain", "trl": "peers.trl_trainer"}
PACKAGES = ("torch", "lightning", "transformers", "trl", "tokenizers", "pillow")
Steps = list[dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    _limit_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = _work(options, Path(folder))
        load = os.getloadavg()
        results = measure(options.competitors, work, warmup=options.warmup, rounds=options.rounds, block=options.block)
    report = {
        "settings": vars(options) | {"work": _settings(work)},
        "machine": _machine(load),
        "summary": summary(results),
        "results": results,
    }
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def measure(
    competitors: Sequence[str], work: Work, *, warmup: int, rounds: int, block: int
) -> dict[str, dict[str, object]]:
    """Steps of every competitor, by round; each process trains on where it stopped."""
    results: dict[str, dict[str, object]] = {name: {"rounds": []} for name in competitors}
    with _started(competitors, work) as drivers:
        for name in competitors:
            _turn(name, drivers[name], warmup)
        for turn in range(rounds):
            shift = turn % len(competitors)  # no one always runs behind the same neighbour
            for name in (*competitors[shift:], *competitors[:shift]):
                answer = _turn(name, drivers[name], block)
                results[name]["rounds"].append(answer["steps"])
                results[name]["peak_rss_mib"] = answer["peak_rss_mib"]
        for driver in drivers.values():
            driver.send_bytes(b"0")
    return results


def _turn(name: str, driver: Connection, steps: int) -> dict[str, object]:
    driver.send_bytes(str(steps).encode())
    try:
        return json.loads(driver.recv_bytes())
    except EOFError:
        raise SystemExit(f"{name} ended before its time; its last words are above") from None


@contextmanager
def _started(competitors: Sequence[str], work: Work) -> Iterator[dict[str, Connection]]:
    """A process a competitor, and the line to it."""
    context = multiprocessing.get_context("spawn")
    drivers, processes = {}, []
    try:
        for name in competitors:
            drivers[name], line = context.Pipe()
            processes.append(context.Process(target=_compete, args=(name, work, line), name=name))
            processes[-1].start()
            line.close()  # the child holds the only other end: if it dies, we read the end of the file
        yield drivers
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def _compete(name: str, work: Work, line: Connection) -> None:
    """Life of a competitor's process; what it prints goes to a log beside its results, or to the screen if it fails."""
    import torch
    from _common import Pace

    torch.set_num_threads(work.threads)
    log = Path(work.output) / f"{name}.log"
    screen = os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        importlib.import_module(PEERS[name]).run(work, Pace(line))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os.write(screen, log.read_bytes())
        raise


def summary(results: dict[str, dict[str, object]]) -> dict[str, dict[str, float]]:
    """Milliseconds a step by competitor, and the ratios of ours to the others."""
    found: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        steps = [step for block in result["rounds"] for step in block]
        for clock in ("wall_ms", "cpu_ms"):
            times = [step[clock] for step in steps]
            found.setdefault(name, {})[clock] = statistics.median(times)
            found[name] |= {f"{clock}_min": min(times), f"{clock}_max": max(times)}
        found[name]["peak_rss_mib"] = result["peak_rss_mib"]
        found[name]["last_reward"] = steps[-1]["reward"]
        phases = [key for key in steps[0] if key.startswith("time/")]
        found[name] |= {key: statistics.median(step[key] for step in steps) for key in phases}
    for other in [name for name in results if name != "ours" and "ours" in results]:
        found[f"ours/{other}"] = _ratios(results["ours"]["rounds"], results[other]["rounds"])
    return found


def _ratios(ours: Sequence[Steps], theirs: Sequence[Steps]) -> dict[str, float]:
    """Ratio of the medians over all steps, and the ratios of each round's medians."""
    found = {}
    for clock in ("wall_ms", "cpu_ms"):
        pairs = [[statistics.median(step[clock] for step in block) for block in pair] for pair in zip(ours, theirs, strict=True)]
        rounds = [mine / other for mine, other in pairs]
        both = [statistics.median(step[clock] for block in blocks for step in block) for blocks in (ours, theirs)]
        found |= {clock: both[0] / both[1], f"{clock}_rounds": statistics.median(rounds)}
        found |= {f"{clock}_rounds_min": min(rounds), f"{clock}_rounds_max": max(rounds)}
    return found


def table(report: dict[str, dict[str, object]]) -> str:
    """What a person wants to see."""
    rows = report["summary"]
    lines = [f"{'ms a step':<12}{'CPU median':>12}{'min':>8}{'max':>8}{'wall median':>14}{'min':>8}{'max':>8}{'MiB':>7}{'reward':>8}"]
    for name in [name for name in rows if "/" not in name]:
        row = rows[name]
        times = "".join(
            f"{row[clock]:>{width}.1f}{row[f'{clock}_min']:>8.1f}{row[f'{clock}_max']:>8.1f}"
            for clock, width in (("cpu_ms", 12), ("wall_ms", 14))
        )
        lines.append(f"{name:<12}{times}{row['peak_rss_mib']:>7.0f}{row['last_reward']:>8.2f}")
    lines.append("")
    for name in [name for name in rows if "/" in name]:
        for clock in ("cpu_ms", "wall_ms"):
            row = {key.removeprefix(clock): x for key, x in rows[name].items() if key.startswith(clock)}
            lines.append(
                f"{name:<12}{clock.removesuffix('_ms'):<5} ratio of medians {row['']:.3f}; of each round "
                f"{row['_rounds']:.3f} ({row['_rounds_min']:.3f} - {row['_rounds_max']:.3f})"
            )
    phases = {key.removeprefix("time/").removesuffix("_seconds"): x for key, x in rows.get("ours", {}).items() if "time/" in key}
    if phases:
        lines.append("\nours by phase, wall ms: " + ", ".join(f"{name} {x:.1f}" for name, x in phases.items()))
    lines.append(", ".join(f"{key} {x}" for key, x in report["machine"].items()))
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--competitors", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, default=1, help="of torch's operators (default 1)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first measured one (default 5)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each competitor (default 8)")
    parser.add_argument("--block", type=int, default=5, help="steps of a turn (default 5)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step (default 32)")
    parser.add_argument("--group-size", type=int, default=8, help="completions a prompt (default 8)")
    parser.add_argument("--family", default="idefics3", help="of the tiny model; plain knows idefics3 only (default)")
    parser.add_argument("--output", default="", help="JSON file for every single time")
    return parser.parse_args(arguments)


def _limit_threads(threads: int) -> None:
    """For this process and its children, before any of them loads torch or tokenizers."""
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def _work(options: argparse.Namespace, folder: Path) -> Work:
    from _common import ANSWERS, QUESTION, Work

    from rllava_pl.models import tiny

    checkpoint = tiny.build(folder / "checkpoint", family=options.family, questions=[QUESTION], answers=ANSWERS)
    return Work(
        str(checkpoint),
        str(folder),
        steps=options.warmup + options.rounds * options.block,
        prompts=options.prompts,
        group_size=options.group_size,
        threads=options.threads,
    )


def _settings(work: Work) -> dict[str, object]:
    return {name: x for name, x in vars(work).items() if name not in ("checkpoint", "output")}


def _machine(load: tuple[float, float, float]) -> dict[str, object]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    loads = f"{load[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    return {"cores": os.cpu_count(), "load": loads, "python": platform.python_version(), **versions}


if __name__ == "__main__":
    main()
