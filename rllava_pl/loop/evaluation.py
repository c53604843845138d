"""Validation, test and prediction: greedy and sampled answers, scored by the same rewards as in training."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from rllava_pl.distributed.collectives import gather_objects
from rllava_pl.rewards import RewardOutput, RewardRunner
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.types import Prompt, Request, Rollout, Sampling

GREEDY = 0


class Scores:
    """Means of everything the rewards return for one split, exact over batches and ranks."""

    def __init__(self, device: torch.device) -> None:
        self._means: dict[str, Metric] = defaultdict(lambda: MeanMetric().set_dtype(torch.float64).to(device))

    def update(self, output: RewardOutput, suffix: str = "") -> None:
        """Add rollouts; one that could not be scored counts as 0 and as ``unscored``."""
        missing = [float(reward is None) for reward in output.rewards]
        named = {"reward": [reward or 0.0 for reward in output.rewards], "unscored": missing, **output.components}
        for name, column in named.items():
            applies = output.applies.get(name, [True] * len(column))
            values = [value for value, counts in zip(column, applies, strict=True) if counts]
            if values:  # a rank may have run out of rows, but takes part in every sync of the engine
                self._means[name + suffix].update(torch.tensor(values, dtype=torch.float64).nan_to_num(0.0))

    def add(self, name: str, values: Tensor) -> None:
        """Add numbers under one name."""
        if values.numel():
            self._means[name].update(values.double())

    def compute(self) -> dict[str, float]:
        """Means over all ranks, by name. Collective."""
        names = set.union(*gather_objects(set(self._means)))  # a rank without rows has no names and still takes part
        return {name: float(self._means[name].compute()) for name in sorted(names)}


class Evaluator:
    """Answers prompts with the present policy and scores the answers.

    Args:
        sampling: Of training; greedy answers take the most likely token instead.
        rewards: Scores the answers.
        requests: ``PolicyModule.requests``.
    """

    engine: ManagedEngine

    def __init__(self, sampling: Sampling, rewards: RewardRunner, requests: Callable[..., list[Request]]) -> None:
        self.sampling = sampling
        self.rewards = rewards
        self.requests = requests
        self.scores = Scores(torch.device("cpu"))

    def connect(self, engine: ManagedEngine) -> None:
        """Sample with this engine from now on."""
        self.engine = engine

    def start(self, device: torch.device) -> None:
        """Begin a validation or test with empty scores."""
        self.scores = Scores(device)

    def answer(self, prompts: Sequence[Prompt], *, samples: int = GREEDY, stream: str = "val") -> list[Rollout]:
        """Rollouts that are not scored; arguments as of ``evaluate``."""
        sampling = self.sampling if samples else dataclasses.replace(self.sampling, temperature=0.0)
        return self.engine.generate(self.requests(prompts, samples=samples or 1, stream=stream), sampling)

    def evaluate(
        self, prompts: Sequence[Prompt], *, samples: int = GREEDY, stream: str = "val"
    ) -> tuple[list[Rollout], RewardOutput]:
        """Answer prompts and score the answers.

        Args:
            prompts: Any number, also none.
            samples: Completions of each prompt at the training temperature; 0: the most likely answer, once.
            stream: Name of the random numbers.
        """
        rollouts = self.answer(prompts, samples=samples, stream=stream)
        return rollouts, self.rewards(rollouts)

    def results(self, stage: str) -> dict[str, float]:
        """``<stage>/accuracy``, ``<stage>/reward``, ...: means since ``start`` over all ranks. Collective."""
        return {f"{stage}/{name}": value for name, value in self.scores.compute().items()}

    def step(self, prompts: Sequence[Prompt], *, samples: int, stream: str) -> None:
        """One batch of a validation or test: the greedy answer of each prompt and ``samples`` more."""
        self.scores.update(self.evaluate(prompts, stream=stream)[1])
        if samples:
            self.scores.update(self.evaluate(prompts, samples=samples, stream=stream)[1], suffix="_sampled")
