"""An engine with the policy's weights: awake while it samples, synchronised before, checked after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from rllava_pl.distributed import signals
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.types import Request, Rollout, RolloutEngine, Sampling

log = logging.getLogger(__name__)

FAULTS = (RuntimeError, OSError)
"""Errors of an engine after which a call is retried; others say that the request or the program is wrong."""


class ManagedEngine:
    """The engine of a module: wakes it, synchronises it if the policy is newer, samples and checks, lets it sleep.

    The first sync happens here, at the first request, and not in an early hook: sharded strategies restore a checkpoint
    late, and whatever was pushed before would be the wrong weights.

    Args:
        build: Makes the engine; called at the first use.
        policy: Whose weights the engine samples with; need not be loaded yet.
        weights: Streams the policy's full weights.
        version: Number of updates in the policy's weights now.
        after_sync: Called with this object whenever the engine has taken over new weights, before it samples.
        phase: Context around each sync, given the name ``sync``; the module's clock.
        retries: Further attempts at a call that fails or whose result fails the check. Seeds belong to the requests, so
            a second result is what the first should have been.
    """

    def __init__(
        self,
        build: Callable[[], RolloutEngine],
        policy: Policy,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        version: Callable[[], int],
        after_sync: Callable[[ManagedEngine], None] = lambda managed: None,
        phase: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
        retries: int = 0,
    ) -> None:
        self._build = build
        self._policy = policy
        self._weights = weights
        self._version = version
        self._after_sync = after_sync
        self._phase = phase
        self.retries = retries
        self.pending: tuple[str, ...] = ()
        """Prompts that the engine is sampling now."""
        self._faults = 0
        self._engine: RolloutEngine | None = None

    @property
    def engine(self) -> RolloutEngine:
        """The wrapped engine, built at the first access."""
        if self._engine is None:
            self._engine = self._build()
        return self._engine

    @property
    def exact(self) -> bool:
        """Whether the engine's log-probs are the trainer's own to rounding."""
        return self.engine.exact

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Rollouts of the policy's present weights, one a seed, in the order of requests and seeds. Collective.

        Raises:
            RuntimeError: The engine failed once more than there are retries; its own error, with what was requested.
            Interrupted: The run was asked to end; no rank waits for samples that will not be used.
        """
        rollouts: list[Rollout] = []
        self.engine.wake()
        self.pending = tuple(dict.fromkeys(request.prompt.uid for request in requests))
        try:
            if self.engine.version != self._version():
                self.synchronise()
                self._after_sync(self)
            for retry in range(1, self.retries + 2):
                try:
                    rollouts = run_episodes(self.engine, self._policy, requests, sampling)
                    break
                except FAULTS as error:
                    if retry > self.retries:
                        raise
                    self._faults += 1
                    message = str(error)  # the error itself would keep the samples alive in handlers that keep records
                    log.warning("the engine failed, retry %d of %d: %s", retry, self.retries, message)
        except signals.Aborted:
            pass  # all ranks stop below
        except FAULTS as error:
            error.add_note(f"the engine was asked for {len(requests)} prompts at update {self._version()}")
            raise
        finally:
            self.pending = ()
            self.engine.sleep()
        signals.stop_if_signalled()
        return rollouts

    def take_faults(self) -> int:
        """Number of calls that failed and were retried since this was last called."""
        faults, self._faults = self._faults, 0
        return faults

    def synchronise(self) -> None:
        """Push the policy's present weights, whatever the engine has."""
        with self._phase("sync"):
            self.engine.sync(self._weights(), self._version())

    def close(self) -> None:
        """Free the engine; idempotent."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
