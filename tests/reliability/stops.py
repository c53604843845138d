"""Sends runs a signal at random moments, checks how they end, resumes them and compares.

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

PHASES = ("rollout", "reward", "logprobs", "update", "save", "validate", WRITE, BETWEEN)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Outcome:
    """Counts over all trials."""

    signalled: dict[str, int] = field(default_factory=dict)
    """By the phase in which the signal came."""
    ended: int = 0
    """Runs with exit code 143."""
    identical: int = 0
    slowest_seconds: float = 0.0
    """From the signal to the end of the process."""
    failures: list[str] = field(default_factory=list)


def trial(root: Path, at: int, number: int, twice: bool, ranks: int, outcome: Outcome, expected: object) -> None:
    """Send a signal once or twice to one rank."""
    clock = Clock(at, partial(send_signal, root, number, twice))
    codes = forks.run(partial(attempt, root, clock), root / "log", ranks)
    sent = json.loads((root / "sent").read_text()) if (root / "sent").exists() else {"phase": "none", "at": 0.0}
    outcome.signalled[sent["phase"]] = outcome.signalled.get(sent["phase"], 0) + 1
    if codes[0] != 143 or any(code not in (0, 143) for code in codes):
        outcome.failures.append(f"call {at} in {sent['phase']}: {codes}: {(root / 'log').read_text()[-2000:]}")
        return
    outcome.ended += 1
    outcome.slowest_seconds = max(outcome.slowest_seconds, round(time.time() - sent["at"], 2))
    codes = forks.run(partial(attempt, root, Clock(counts=False)), root / "log", ranks)
    if codes != [0] * ranks:
        outcome.failures.append(f"call {at} in {sent['phase']}: resume: {(root / 'log').read_text()[-2000:]}")
    elif difference := victim.difference(expected, kills.end_of(root)):
        outcome.failures.append(f"call {at} in {sent['phase']}: different end: {difference}")
    else:
        outcome.identical += 1


def attempt(root: Path, clock: Clock, rank: int) -> None:
    """Regular checkpoints are so rare that the resumed one is that of the signal."""
    with victim.marking_writes(clock):
        victim.train(root, clock if rank == 0 else Clock(counts=False), every_n_rollouts=2)


def send_signal(root: Path, number: int, twice: bool, clock: Clock) -> None:
    (root / "sent").write_text(json.dumps({"phase": clock.phase, "at": time.time()}))
    for _ in range(1 + twice):
        os.kill(os.getpid(), number)


def campaign(trials: int, ranks: int = 1, seed: int = 0, workers: int = 1) -> dict[str, object]:
    """Run all trials in a temporary directory."""
    start = time.monotonic()
    victim.runs.tiny().prepare(1)
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        (base / "uninterrupted").mkdir()
        expected, moments = kills.reference(base / "uninterrupted", ranks, every_n_rollouts=2)
        last = moments["rollout"][-7].start  # in its last pass a run may end before it handles the signal

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
