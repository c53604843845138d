"""An engine that is always in step with the policy: awake while it samples, synchronised before, checked after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from rllava_pl.distributed import signals
from rllava_pl.types import Request, Rollout, RolloutEngine, Sampling

log = logging.getLogger(__name__)

FAULTS = (RuntimeError, OSError)
"""Errors of an engine after which it is asked again; others say that the request or the program is wrong."""


class ManagedEngine:
    """Wraps an engine for the module: wake, sync if the policy is newer, generate, check, sleep.

    The first sync happens here, at the first request, and not in an early hook: sharded strategies restore a checkpoint
    late, and whatever was pushed before would be the wrong weights.

    Args:
        build: Makes the engine; called at the first use.
        weights: Streams the policy's full weights.
        version: Number of updates in the policy's weights now.
        after_sync: Called with this object whenever the engine has taken over new weights, before it samples.
        phase: Context around each sync, given the name ``sync``; the module's clock.
        retries: Times a call that fails, or whose answer fails the check, is made again. Seeds belong to the requests,
            so that a second answer is what the first should have been.
    """

    def __init__(
        self,
        build: Callable[[], RolloutEngine],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        version: Callable[[], int],
        after_sync: Callable[[ManagedEngine], None] | None = None,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        retries: int = 0,
    ) -> None:
        self._build = build
        self._weights = weights
        self._version = version
        self._after_sync = after_sync
        self._phase = phase
        self.retries = retries
        self._faults = 0
        self.pending: tuple[str, ...] = ()
        """Prompts that the engine is at work on."""
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
        """Rollouts of the policy's present weights; see ``RolloutEngine.generate``. Collective.

        Raises:
            RuntimeError: The engine failed once more than there are retries; its own error, with what was asked.
            Interrupted: The run was asked to end; no rank waits for an answer that nobody will use.
        """
        rollouts: list[Rollout] = []
        with self._awake(), self._at_work(requests), suppress(signals.Aborted):
            if self.engine.version != self._version():
                self.synchronise()
                if self._after_sync is not None:
                    self._after_sync(self)
            rollouts = self._answer(requests, sampling)
        signals.leave_if_asked()
        return rollouts

    def _answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """A checked answer, if need be after some that were none."""
        for retry in range(1, self.retries + 1):
            try:
                return self._checked(requests, sampling)
            except FAULTS as error:
                self._faults += 1
                told = str(error)  # the error itself would keep the answer alive in handlers that keep records
                log.warning("the engine failed, retry %d of %d: %s", retry, self.retries, told)
        return self._checked(requests, sampling)

    def _checked(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = self.engine.generate(requests, sampling)
        check_rollouts(requests, rollouts, self._version())
        return rollouts

    def take_faults(self) -> int:
        """Calls that failed and were made again since this was last asked."""
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

    @contextmanager
    def _at_work(self, requests: Sequence[Request]) -> Iterator[None]:
        self.pending = tuple(dict.fromkeys(request.prompt.uid for request in requests))
        try:
            yield
        except FAULTS as error:
            error.add_note(f"the engine was asked for {len(requests)} prompts at update {self._version()}")
            raise
        finally:
            self.pending = ()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self.engine.wake()
        try:
            yield
        finally:
            self.engine.sleep()


class FaultyRolloutsError(RuntimeError):
    """An engine returned something else than what was asked of it."""


def check_rollouts(requests: Sequence[Request], rollouts: Sequence[Rollout], version: int) -> None:
    """What an engine returned is what was asked of it.

    Raises:
        FaultyRolloutsError: Naming the prompt: wrong number or order of rollouts, other prompt tokens than the
            trainer's, stale weights, lengths that differ, given tokens that are missing or not marked as a
            demonstration's, log-probs that are positive or not finite.
    """
    expected = [request for request in requests for _ in request.seeds]
    if len(rollouts) != len(expected):
        raise FaultyRolloutsError(f"the engine was asked for {len(expected)} samples and returned {len(rollouts)}")
    for request, rollout in zip(expected, rollouts, strict=True):
        if fault := _fault(request, rollout, version):
            raise FaultyRolloutsError(f"rollout of prompt {request.prompt.uid!r}: {fault}")
    if rollouts and not _sound(torch.cat([rollout.engine_logprobs for rollout in rollouts])):  # one look at all of them
        uid = next(rollout.prompt.uid for rollout in rollouts if not _sound(rollout.engine_logprobs))
        raise FaultyRolloutsError(f"rollout of prompt {uid!r}: a log-prob is positive or not finite")


def _fault(request: Request, rollout: Rollout, version: int) -> str:
    if rollout.prompt.uid != request.prompt.uid or rollout.group != request.group:
        return f"the engine answered for prompt {rollout.prompt.uid!r} in its place: samples are out of order"
    ids = request.inputs.input_ids_S
    if rollout.prompt_ids is not ids and not torch.equal(rollout.prompt_ids, ids):
        return (
            f"the engine read {len(rollout.prompt_ids)} prompt tokens, the trainer {len(ids)}, and they must be equal; "
            "look for image placeholders that were expanded twice or another chat template"
        )
    if rollout.weight_version != version:
        return f"sampled with weights of update {rollout.weight_version}, the policy is at update {version}"
    shape = rollout.response_ids.shape
    if not shape == rollout.engine_logprobs.shape == rollout.response_mask.shape:
        lengths = {len(rollout.response_ids), len(rollout.engine_logprobs), len(rollout.response_mask)}
        return f"ids, log-probs and mask have different lengths: {sorted(lengths)}"
    return _prefix_fault(request.prefix_ids, rollout)


def _prefix_fault(prefix_ids: tuple[int, ...], rollout: Rollout) -> str:
    ids_T, demo_mask, given = rollout.response_ids, rollout.demo_mask, len(prefix_ids)
    if not given and demo_mask is None:
        return ""
    if (begins := tuple(ids_T[:given].tolist())) != prefix_ids:
        return f"the response begins with the tokens {list(begins)} instead of the given ones {list(prefix_ids)}"
    marked = torch.zeros_like(ids_T, dtype=torch.bool) if demo_mask is None else demo_mask
    if not torch.equal(marked, torch.arange(len(ids_T)) < given):
        return f"demo_mask must be True at the {given} given tokens and nowhere else, or they count as sampled"
    return ""


def _sound(logp: Tensor) -> bool:
    return bool(((logp <= 1e-6) & torch.isfinite(logp)).all())
