"""Rewards in processes that can be killed.

What a reward does to its process (hang, crash, eat memory, flood its output, start others) ends with that process. A
sample has a deadline; when it has passed, the worker and all that it started are killed, and another takes over.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Sequence

from rllava_pl.rewards.isolation import protocol as wire
from rllava_pl.rewards.isolation.spec import RewardSpec
from rllava_pl.rewards.isolation.workers import Call, Nursery, NurseryGone, Worker
from rllava_pl.rewards.scoring import Scoring
from rllava_pl.types import Rollout, Score

AT_ONCE = 16
"""Most samples a worker is given at a time; it still answers one by one, and what it did not get to is not lost."""


class RewardPool:
    """Workers that score rollouts with rewards built in another process; not to be shared by threads.

    Args:
        recipes: The rewards.
        workers: Processes that score at a time.
        memory_bytes: What each may take on top of what it starts with.
        recycle_after: Samples after which a worker makes room for a fresh one.
    """

    def __init__(self, recipes: Sequence[RewardSpec], scoring: Scoring) -> None:
        self.recipes = recipes
        self.most_workers = scoring.workers
        self.memory_bytes = int(scoring.memory_gib * 2**30)
        self.recycle_after = scoring.recycle_after
        self.restarts = 0
        """Processes replaced after a fault; whoever reads it may set it back."""
        self.workers: list[Worker] = []
        self._nursery: Nursery | None = None

    def start(self) -> None:
        """Start the process that builds the rewards; returns at once, so that the trainer can load its model."""
        self._nursery = self._nursery or Nursery(self.recipes, self.memory_bytes)

    def close(self) -> None:
        """End all processes; idempotent, and ``score`` starts them again."""
        for worker in self.workers:
            worker.close()
        self.workers.clear()
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def score(
        self,
        reward: int,
        rollouts: Sequence[Rollout],
        *,
        timeout_seconds: float,
        images: bool = False,
        together: bool = False,
    ) -> tuple[list[Score], list[float]]:
        """Scores of every sample and the seconds it took, in order.

        Args:
            reward: Position in ``recipes``.
            rollouts: Any number.
            timeout_seconds: For one sample, or for all if ``together``.
            images: Send the prompts' images.
            together: Give all rollouts to one worker in one call.

        Raises:
            RewardError: The rewards cannot be built in another process.
        """
        groups = [range(len(rollouts))] if together and rollouts else [[n] for n in range(len(rollouts))]
        calls = [Call(group, [rollouts[n] for n in group], timeout_seconds) for group in groups]
        shift = _Shift(self, reward, images, calls, len(rollouts))
        for _ in range(2):  # a nursery that was killed is replaced once
            self.start()
            self._nursery.wait_until_ready()
            try:
                shift.work()
                break
            except NurseryGone:
                shift.take_back(self.workers)
                for worker in self.workers:
                    worker.kill_group()
                self.close()
                self.restarts += 1
            except BaseException:  # Ctrl-C: what workers still answer would be taken for answers to the next questions
                self.close()
                raise
        return shift.scores, shift.seconds

    def idle_worker(self) -> Worker | None:
        """One that waits for work, made if need be; None if all are busy."""
        for worker in [w for w in self.workers if not w.calls and w.samples >= self.recycle_after]:
            self.end(worker)
        idle = next((worker for worker in self.workers if not worker.calls), None)
        if idle is None and len(self.workers) < self.most_workers:
            idle = self._nursery.fork()
            self.workers.append(idle)
        return idle

    def end(self, worker: Worker) -> None:
        """Kill a worker and what it started."""
        self._nursery.end(worker)
        self.workers.remove(worker)


class _Shift:
    """One call of ``RewardPool.score``: who works on what, and what has come of it."""

    def __init__(self, pool: RewardPool, reward: int, images: bool, calls: Sequence[Call], samples: int) -> None:
        self.pool, self.reward, self.images = pool, reward, images
        self.left = deque(calls)
        self.at_once = 1 if images else max(1, min(AT_ONCE, len(calls) // (2 * pool.most_workers)))
        self.scores = [Score(None, reason="pool", detail="its processes were ended from outside, twice")] * samples
        self.seconds = [0.0] * samples

    @property
    def busy(self) -> list[Worker]:
        """Workers that have not answered everything."""
        return [worker for worker in self.pool.workers if worker.calls]

    def work(self) -> None:
        """Hand out calls and take in answers until there is none left.

        Raises:
            NurseryGone: Workers can be neither made nor ended.
        """
        while self.left or self.busy:
            while self.left and (worker := self.pool.idle_worker()):
                self._hand_out(worker)
            for worker in self._heard_from():
                self._take_in(worker)
            for worker in self.busy:
                if time.perf_counter() >= worker.deadline:
                    self._replace(worker, "timeout")

    def take_back(self, workers: Sequence[Worker]) -> None:
        """What these workers have not answered is to be done by others."""
        for worker in workers:
            self.left.extendleft(reversed(worker.calls))
            worker.calls.clear()

    def _hand_out(self, worker: Worker) -> None:
        calls = [self.left.popleft() for _ in range(min(self.at_once, len(self.left)))]
        worker.calls.extend(calls)
        worker.since = time.perf_counter()
        rollouts = [rollout for call in calls for rollout in call.rollouts]
        worker.reader.limit_bytes = wire.MAX_ANSWER_BYTES * len(calls[0].rollouts)
        worker.line.settimeout(calls[0].seconds_left)
        try:
            worker.line.sendall(wire.rollout_request(self.reward, rollouts, images=self.images))
        except OSError:
            self._replace(worker, "crash")

    def _heard_from(self) -> list[Worker]:
        """Workers with something to read, waited for until the next deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in self.busy:
                selector.register(worker.line, selectors.EVENT_READ, worker)
            wait = min((worker.deadline for worker in self.busy), default=0.0) - time.perf_counter()
            return [key.data for key, _ in selector.select(max(wait, 0.0))]

    def _take_in(self, worker: Worker) -> None:
        scores: list[Score] = []
        try:
            piece = worker.line.recv(1 << 16)
            for message, _ in worker.reader.feed(piece):
                if not worker.calls:
                    raise wire.WireError("an answer to no question")
                scores = wire.read_scores(message, len(worker.calls[0].positions))
                self._settle(worker, scores)
        except (OSError, wire.WireError):
            piece = b""
        if not piece:
            self._replace(worker, "crash")
        elif any(score.reason == "memory" for score in scores):
            self._replace(worker, "memory")

    def _settle(self, worker: Worker, scores: Sequence[Score]) -> None:
        """The first call of the worker is done, and it goes on with the next."""
        call, now = worker.calls.popleft(), time.perf_counter()
        for position, score in zip(call.positions, scores, strict=True):
            self.scores[position] = score
            self.seconds[position] = now - worker.since
        worker.since = now
        worker.samples += len(scores)

    def _replace(self, worker: Worker, cause: str) -> None:
        """End a worker; its present call is to blame for a ``timeout`` or the second ``crash``, the others are not."""
        if worker.calls and cause != "memory":
            call = worker.calls[0]
            call.lost += 1
            call.seconds_left = max(worker.deadline - time.perf_counter(), 0.1)
            if cause == "timeout" or call.lost > 1:
                fault = Score(None, reason=cause, detail=_DETAILS[cause])
                self._settle(worker, [fault] * len(call.positions))
        self.take_back([worker])
        self.pool.restarts += 1
        self.pool.end(worker)


_DETAILS = {
    "timeout": "no score within its time (timeout_seconds of the reward, or judging.timeout_seconds)",
    "crash": "its process ended without a score, twice",
}
