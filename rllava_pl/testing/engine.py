"""An engine that fails on purpose."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer

from rllava_pl.rollout.callbacks import RolloutCallback, SamplingModule, TransformersRollout
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.testing.schedule import Schedule
from rllava_pl.types import Generation, Request, RolloutEngine, Sampling

EngineFault = Literal[
    "dies",
    "times_out",
    "too_few",
    "wrong_handle",
    "wrong_version",
    "nan_logprobs",
    "positive_logprobs",
    "other_prompt_ids",
    "hangs",
]
SURVIVED = get_args(EngineFault)[:-1]
"""Faults after which a call can be retried; a call that hangs is for the watchdog."""


class FaultyEngine:
    """Any engine, failing at calls of ``start`` that the schedule names; otherwise it is that engine.

    ========================= ==========================================================================
    ``dies``                  raises RuntimeError before it samples
    ``times_out``             raises TimeoutError
    ``hangs``                 never returns
    ``too_few``               the last sample is missing
    ``wrong_handle``          one sample has a handle that was not started
    ``wrong_version``         one sample says it was drawn with older weights
    ``nan_logprobs``          a log-prob is not a number
    ``positive_logprobs``     a log-prob is above 0
    ``other_prompt_ids``      a prompt has one token more than the trainer's
    ========================= ==========================================================================

    Args:
        engine: The one that samples.
        schedule: Gives the fault of each call, counted from 0.
    """

    def __init__(self, engine: RolloutEngine, schedule: Schedule) -> None:
        self.wrapped = engine
        self.schedule = schedule
        self.calls = 0
        self.injected: Counter[str] = Counter()
        """Faults so far, by kind."""
        self._fault = ""

    def __getattr__(self, name: str) -> object:
        return getattr(self.wrapped, name)

    def start(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """Of the wrapped engine; draws the fault of the next ``advance``."""
        self._fault = self.schedule.at(self.calls)
        self.calls += 1
        self.injected.update([self._fault] if self._fault else [])
        return self.wrapped.start(requests, sampling)

    def advance(self) -> list[Generation]:
        """The samples of the wrapped engine, unless this call is to fail."""
        fault, self._fault = self._fault, ""
        if fault == "dies":
            raise RuntimeError(f"call {self.calls - 1}: the engine died, as scheduled")
        if fault == "times_out":
            raise TimeoutError(f"call {self.calls - 1}: the engine did not answer, as scheduled")
        if fault == "hangs":
            threading.Event().wait()
        generations = self.wrapped.advance()
        if fault == "too_few":
            return generations[:-1]
        if fault and generations:
            generations = [CORRUPT[fault](generations[0]), *generations[1:]]
        return generations


class FaultyRollout(RolloutCallback):
    """Rollouts from an engine that fails now and then, to see how a run handles it.

    Args:
        rollout: The callback whose engine samples; by default the embedded one.
        faults: Kinds, see ``FaultyEngine``; by default all that can be survived.
        rate: Part of the calls that fail, retries included.
        seed: Of the schedule.
        retries: Further attempts at a failed call before the run stops.
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

    def build(self, module: SamplingModule) -> RolloutEngine:
        """The wrapped callback's engine, made unreliable."""
        self.engine = FaultyEngine(self.rollout.build(module), self.schedule)
        return cast(RolloutEngine, self.engine)

    def after_sync(self, managed: ManagedEngine) -> None:
        """As of the wrapped callback."""
        self.rollout.after_sync(managed)


def _with_logprob(value: float) -> Callable[[Generation], Generation]:
    return lambda g: dataclasses.replace(g, logprobs_T=torch.full_like(g.logprobs_T, value))


CORRUPT: Mapping[str, Callable[[Generation], Generation]] = MappingProxyType(
    {
        "wrong_handle": lambda g: dataclasses.replace(g, handle=-1),
        "wrong_version": lambda g: dataclasses.replace(g, weight_version=g.weight_version - 1),
        "nan_logprobs": _with_logprob(float("nan")),
        "positive_logprobs": _with_logprob(0.5),
        "other_prompt_ids": lambda g: dataclasses.replace(g, prompt_ids=torch.cat([g.prompt_ids, g.prompt_ids[-1:]])),
    }
)
"""Changes to a sample that the check must find."""
