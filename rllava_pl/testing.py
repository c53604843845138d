"""Injected faults: try what a run does when an engine or a reward fails.

Faults are a pure function of a seed and of what identifies a call, so a run that met one meets it again.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer

from rllava_pl.functional.seeds import seed_from
from rllava_pl.rewards.base import BaseReward
from rllava_pl.rollout.callbacks import RolloutCallback, SamplingModule, TransformersRollout
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.types import Generation, Request, Rollout, RolloutEngine, Sampling, Score

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
RewardFault = Literal["none", "nan", "inf", "wrong_type", "raises", "hangs", "exits", "eats_memory"]
IN_PROCESS = get_args(RewardFault)[:-3]
"""Faults that cost one sample even without a worker process."""
CORRUPT: Mapping[str, Callable[[Generation], Generation]] = MappingProxyType(
    {
        "wrong_handle": lambda g: replace(g, handle=-1),
        "wrong_version": lambda g: replace(g, weight_version=g.weight_version - 1),
        "nan_logprobs": lambda g: replace(g, logprobs_T=torch.full_like(g.logprobs_T, math.nan)),
        "positive_logprobs": lambda g: replace(g, logprobs_T=torch.full_like(g.logprobs_T, 0.5)),
        "other_prompt_ids": lambda g: replace(g, prompt_ids=torch.cat([g.prompt_ids, g.prompt_ids[-1:]])),
    }
)
"""Changes to a sample that the check must find."""


class Schedule:
    """Random but reproducible faults: a pure function of the seed and of what identifies a call.

    Example: ``Schedule(["dies", "hangs"], rate=0.05).at(17)`` is "dies", "hangs" or "", in any process.

    Args:
        kinds: Faults, all equally likely.
        rate: Part of the calls that have a fault.
        seed: Of the draws.
        known: All kinds there are.
    """

    def __init__(self, kinds: Sequence[str], rate: float, seed: int = 0, known: Sequence[str] = ()) -> None:
        if unknown := [kind for kind in kinds if known and kind not in known]:
            raise ValueError(f"faults: there is no {unknown[0]!r}; there are {', '.join(known)}")
        if not kinds:
            raise ValueError("faults is empty; name at least one kind, or remove the class")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}; it is the part of the calls that fail, from 0 to 1")
        self.kinds = tuple(kinds)
        self.rate = rate
        self.seed = seed

    def at(self, *call: int | str) -> str:
        """The fault of this call; empty for most."""
        if seed_from(self.seed, "fault", *call) >= self.rate * 2**63:
            return ""
        return self.kinds[seed_from(self.seed, "kind", *call) % len(self.kinds)]


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


class FaultyReward(BaseReward):
    """Scores 0, and fails for the samples that the schedule selects.

    ``none``: returns None; ``nan``, ``inf``: not finite; ``wrong_type``: a string; ``raises``: an exception; ``hangs``:
    never returns; ``exits``: ends its process; ``eats_memory``: until none is left. The last three need a worker
    process, in which rewards run unless ``scoring.isolation`` says otherwise.

    Args:
        faults: Kinds of faults, all equally likely.
        rate: Fraction of the samples that it does not score.
        seed: Of the schedule, which depends on prompt, weight version and tokens of the sample.
    """

    def __init__(self, faults: list[RewardFault], rate: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        self.schedule = Schedule(faults, rate, seed, known=get_args(RewardFault))

    def fault(self, rollout: Rollout) -> str:
        """The fault of this sample; empty for most."""
        return self.schedule.at(rollout.prompt.uid, *rollout.weight_versions, *rollout.response_ids.tolist())

    def score(self, rollout: Rollout) -> Score:
        """0, or a fault."""
        match self.fault(rollout):
            case "":
                return Score(0.0)
            case "nan" | "inf" as value:
                return Score(float(value))
            case "wrong_type":
                return Score(cast(float, "1.0"))
            case "raises":
                raise ArithmeticError("the reward failed, as scheduled")
            case "hangs":
                threading.Event().wait()
            case "exits":
                os._exit(1)
            case "eats_memory":
                eaten = []
                while True:
                    eaten.append(bytearray(2**24))
        return cast(Score, None)
