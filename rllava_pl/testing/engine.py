"""An engine that fails on purpose."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rllava_pl.rollout.callbacks import RolloutCallback, Samples, TransformersRollout
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.testing.schedule import Schedule
from rllava_pl.types import Request, Rollout, RolloutEngine, Sampling

EngineFault = Literal[
    "dies",
    "times_out",
    "too_few",
    "wrong_order",
    "wrong_version",
    "nan_logprobs",
    "positive_logprobs",
    "other_prompt_ids",
    "hangs",
]
SURVIVED = get_args(EngineFault)[:-1]
"""Faults after which an engine can be asked again; one that hangs is for the watchdog."""

Spoil = Callable[[list[Rollout]], list[Rollout]]


class FaultyEngine:
    """Any engine, failing at calls of ``generate`` that the schedule names; in all else it is that engine.

    ========================= ==========================================================================
    ``dies``                  raises RuntimeError before it samples
    ``times_out``             raises TimeoutError
    ``hangs``                 never returns
    ``too_few``               the last sample is missing
    ``wrong_order``           the samples come in reverse
    ``wrong_version``         one sample says it was drawn with older weights
    ``nan_logprobs``          a log-prob is not a number
    ``positive_logprobs``     a log-prob is above 0
    ``other_prompt_ids``      a prompt has one token more than the trainer's
    ========================= ==========================================================================

    Args:
        engine: The one that does the work.
        schedule: Asked with the number of the call, counted from 0.
    """

    def __init__(self, engine: RolloutEngine, schedule: Schedule) -> None:
        self.wrapped = engine
        self.schedule = schedule
        self.calls = 0
        self.injected: Counter[str] = Counter()
        """Faults so far, by kind."""

    @property
    def exact(self) -> bool:
        """Of the wrapped engine."""
        return self.wrapped.exact

    @property
    def version(self) -> int:
        """Of the wrapped engine."""
        return self.wrapped.version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """What the wrapped engine answers, unless this call is to fail."""
        fault = self.schedule.at(self.calls)
        self.calls += 1
        self.injected.update([fault] if fault else [])
        if fault == "dies":
            raise RuntimeError(f"call {self.calls - 1}: the engine died, as was asked for")
        if fault == "times_out":
            raise TimeoutError(f"call {self.calls - 1}: the engine did not answer, as was asked for")
        if fault == "hangs":
            threading.Event().wait()
        rollouts = self.wrapped.generate(requests, sampling)
        return SPOILT[fault](list(rollouts)) if fault and rollouts else rollouts

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Of the wrapped engine."""
        self.wrapped.sync(named_tensors, version)

    def sleep(self) -> None:
        """Of the wrapped engine."""
        self.wrapped.sleep()

    def wake(self) -> None:
        """Of the wrapped engine."""
        self.wrapped.wake()

    def close(self) -> None:
        """Of the wrapped engine."""
        self.wrapped.close()


class FaultyRollout(RolloutCallback):
    """Rollouts from an engine that fails now and then, to see what a run makes of it.

    Args:
        rollout: The callback whose engine does the work; by default the embedded one.
        faults: Kinds, see ``FaultyEngine``; by default all that can be survived.
        rate: Part of the calls that fail, those that repeat a failed one included.
        seed: Of the schedule.
        retries: Times a failed call is made again before the run stops.
    """

    def __init__(
        self,
        rollout: RolloutCallback | None = None,
        faults: list[EngineFault] | None = None,
        rate: float = 0.05,
        seed: int = 0,
        retries: int = 2,
    ) -> None:
        self.rollout = rollout or TransformersRollout()
        self.schedule = Schedule(SURVIVED if faults is None else faults, rate, seed, known=get_args(EngineFault))
        self.retries = retries
        self.engine: FaultyEngine | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As of the wrapped callback, whose engine is then built here."""
        self.rollout.setup(trainer, pl_module, stage)
        super().setup(trainer, pl_module, stage)

    def build(self, module: Samples) -> FaultyEngine:
        """The wrapped callback's engine, made unreliable."""
        self.engine = FaultyEngine(self.rollout.build(module), self.schedule)
        return self.engine

    def after_sync(self, managed: ManagedEngine) -> None:
        """As of the wrapped callback."""
        self.rollout.after_sync(managed)


def _first(change: Callable[[Rollout], Rollout]) -> Spoil:
    return lambda rollouts: [change(rollouts[0]), *rollouts[1:]]


def _with_logprob(value: float) -> Spoil:
    return _first(lambda rollout: dataclasses.replace(rollout, engine_logprobs=rollout.engine_logprobs * 0 + value))


SPOILT: Mapping[str, Spoil] = MappingProxyType(
    {
        "too_few": lambda rollouts: rollouts[:-1],
        "wrong_order": lambda rollouts: rollouts[::-1],
        "wrong_version": _first(lambda r: dataclasses.replace(r, weight_version=r.weight_version - 1)),
        "nan_logprobs": _with_logprob(float("nan")),
        "positive_logprobs": _with_logprob(0.5),
        "other_prompt_ids": _first(
            lambda r: dataclasses.replace(r, prompt_ids=torch.cat([r.prompt_ids, r.prompt_ids[-1:]]))
        ),
    }
)
"""Answers that are not what was asked."""
