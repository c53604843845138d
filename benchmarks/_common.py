"""The work and the clock that all competitors of a step-time comparison share."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.functional.seeds import permutation
from rllava_pl.types import Prompt

QUESTION, ANSWERS = TASKS["color"].question, TASKS["color"].answers


@dataclass(frozen=True)
class Work:
    """One training run on the colour task, the same for all competitors.

    AdamW (0.9, 0.95), fused, no weight decay; learning rate 1e-3 after a linear warm-up, then a linear decay to 10 %;
    global gradient norm at most 1; KL coefficient 0.04 to the checkpoint; clip range 0.2 / 0.28; fp32.
    """

    checkpoint: str
    """Directory of the tiny model."""
    output: str
    """Directory for logs."""
    steps: int
    """Rollouts in the whole run, warm-up included."""
    prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Completions a prompt."""
    minibatches: int = 2
    """Updates a step, each on its share of the completions."""
    max_tokens: int = 8
    """Response budget."""
    threads: int = 1
    """Of torch's operators."""
    seed: int = 1

    learning_rate: float = 1e-3
    kl_coef: float = 0.04
    clip_low: float = 0.2
    clip_high: float = 0.28

    @property
    def updates(self) -> int:
        """Optimizer steps in the whole run."""
        return self.steps * self.minibatches

    @property
    def warmup_updates(self) -> int:
        """Optimizer steps in which the learning rate rises."""
        return min(20, self.updates // 2)

    def dataset(self) -> list[Prompt]:
        """One prompt a row, in a random order, pictures drawn beforehand: drawing is not compared."""
        rows = self.steps * self.prompts
        drawn = DrawnPrompts("color", "train", rows)
        return [drawn[row] for row in permutation(self.seed, rows)]


class Pace:
    """Runs a competitor in blocks of steps, so that several can take turns on one machine.

    A step is timed from a point of the training loop to the same point of the next pass, so nothing is left out between
    two measurements. At the end of a block the times are sent to the driver, and the process waits for its next turn.
    """

    def __init__(self, driver: Connection) -> None:
        self.driver = driver
        self.steps_left = 0
        self.rows: list[dict[str, float]] = []
        self.since = (0.0, 0.0)

    def begin(self) -> None:
        """Wait for the first turn; call it when everything is loaded."""
        self._wait()

    def tick(self, facts: Callable[[], Mapping[str, float]]) -> None:
        """End of a step: record its time and the competitor's ``facts``, computed outside of the timed interval."""
        wall, cpu = time.perf_counter() - self.since[0], time.process_time() - self.since[1]
        self.rows.append({"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, **facts()})
        self.steps_left -= 1
        if self.steps_left == 0:
            self._report()
            self._wait()
        self.since = time.perf_counter(), time.process_time()

    def _report(self) -> None:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.driver.send_bytes(json.dumps({"steps": self.rows, "peak_rss_mib": peak_kib / 1024}).encode())
        self.rows = []

    def _wait(self) -> None:
        """Block until the driver sends the number of steps to run; 0: the rest of the run is not timed."""
        self.steps_left = int(self.driver.recv_bytes())
        self.since = time.perf_counter(), time.process_time()
