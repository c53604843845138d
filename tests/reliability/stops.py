"""Asks a run to leave in the middle of a phase, looks how it ends, resumes it and compares.

python -m tests.reliability.stops --trials 40 --workers 2
python -m tests.reliability.stops --trials 10 --ranks 2 --sharded
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.reliability import forks, kills, victim
from tests.reliability.victim import BETWEEN, WRITE, Clock

PHASES = ("rollout", "reward", "evaluate", "update", "save", "validate", WRITE, BETWEEN)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Outcome:
    """Of all trials."""

    asked: dict[str, int] = field(default_factory=dict)
    """By the phase in which the signal came."""
    left: int = 0
    """Ended with exit code 143."""
    identical: int = 0
    slowest_seconds: float = 0.0
    """From the signal to the end of the process."""
    failures: list[str] = field(default_factory=list)


def trial(root: Path, at: int, number: int, twice: bool, ranks: int, outcome: Outcome, expected: object) -> None:
    """Ask once or twice, by one signal, on one rank."""
    clock = Clock(at, partial(ask, root, number, twice))
    codes = forks.run(partial(attempt, root, clock), root / "log", ranks)
    asked = json.loads((root / "asked").read_text()) if (root / "asked").exists() else {"phase": "none", "at": 0.0}
    outcome.asked[asked["phase"]] = outcome.asked.get(asked["phase"], 0) + 1
    if codes[0] != 143 or any(code not in (0, 143) for code in codes):
        outcome.failures.append(f"call {at} in {asked['phase']}: {codes}: {(root / 'log').read_text()[-2000:]}")
        return
    outcome.left += 1
    outcome.slowest_seconds = max(outcome.slowest_seconds, round(time.time() - asked["at"], 2))
    codes = forks.run(partial(attempt, root, Clock(counts=False)), root / "log", ranks)
    if codes != [0] * ranks:
        outcome.failures.append(f"call {at} in {asked['phase']}: resume: {(root / 'log').read_text()[-2000:]}")
    elif difference := victim.difference(expected, kills.end_of(root)):
        outcome.failures.append(f"call {at} in {asked['phase']}: another end: {difference}")
    else:
        outcome.identical += 1


def attempt(root: Path, clock: Clock, rank: int) -> None:
    """Checkpoints are so rare that what is resumed is what the signal saved."""
    with victim.marking_writes(clock):
        victim.train(root, clock if rank == 0 else Clock(counts=False), every_n_rollouts=2)


def ask(root: Path, number: int, twice: bool, clock: Clock) -> None:
    (root / "asked").write_text(json.dumps({"phase": clock.phase, "at": time.time()}))
    for _ in range(1 + twice):
        os.kill(os.getpid(), number)


def campaign(trials: int, ranks: int = 1, seed: int = 0, workers: int = 1) -> dict[str, object]:
    """Run all trials in a directory that is removed again."""
    start = time.monotonic()
    victim.runs.tiny().prepare(1)
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        (base / "whole").mkdir()
        expected, moments = kills.reference(base / "whole", ranks, every_n_rollouts=2)
        last = moments["rollout"][-7].start  # asked in its last pass, a run may well end by itself

        def work(worker: int) -> dict[str, object]:
            outcome = Outcome()
            for k in range(worker, trials, workers):
                draw = random.Random(f"{seed}/{k}")
                spans = [span for span in moments[PHASES[k % len(PHASES)]] if span.stop <= last]
                at = draw.choice(draw.choice(spans))
                with kills.fresh(base / str(k)) as root:
                    trial(root, at, SIGNALS[k // 2 % 2], k % 3 == 0, ranks, outcome, expected)
            return asdict(outcome)

        found = kills.merged(forks.share_out(work, workers, base))
    return {"trials": trials, "ranks": ranks, **found, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    print(json.dumps(campaign(**kills.arguments(trials=40))))
