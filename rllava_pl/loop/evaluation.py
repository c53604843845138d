"""Validation, test and prediction: greedy and sampled answers, scored by the same rewards as in training."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torchmetrics import MeanMetric, Metric

from rllava_pl.distributed.collectives import gather_objects
from rllava_pl.loop.lifecycle import Lifecycle
from rllava_pl.rewards.output import Judgement
from rllava_pl.types import Prompt, PromptBatch, Rollout, RolloutBatch

GREEDY = 0


class Scores:
    """Means of everything the rewards say of one split, exact over batches and ranks."""

    def __init__(self, device: torch.device) -> None:
        self._means: dict[str, Metric] = defaultdict(lambda: MeanMetric().set_dtype(torch.float64).to(device))

    def update(self, judgement: Judgement, suffix: str = "") -> None:
        """Add rollouts; one that could not be scored counts as 0 and as ``unscored``."""
        missing = [float(reward is None) for reward in judgement.rewards]
        named = {"reward": [reward or 0.0 for reward in judgement.rewards], "unscored": missing, **judgement.components}
        for name, values in named.items():
            if values:  # a rank may have run out of rows, but takes part in every sync of the engine
                self._means[name + suffix].update(torch.tensor(values, dtype=torch.float64).nan_to_num(0.0))

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add numbers of one name."""
        if values.numel():
            self._means[name].update(values.double())

    def compute(self) -> dict[str, float]:
        """Means over all ranks, by name; collective."""
        names = set.union(*gather_objects(set(self._means)))  # a rank without rows has met no name and still takes part
        return {name: float(self._means[name].compute()) for name in sorted(names)}


class Evaluation(Lifecycle):
    """Scores of the present policy, for validation, test and prediction of ``RLModule``."""

    def examine(
        self, prompts: Sequence[Prompt], *, samples: int = GREEDY, stream: str = "val"
    ) -> tuple[list[Rollout], Judgement]:
        """Answer prompts and judge the answers.

        Args:
            prompts: Any number, also none.
            samples: Draws of each prompt at the training temperature; 0 takes the most likely answer, once.
            stream: Name of the random stream of the draws.
        """
        rollouts = self.answer(prompts, samples=samples, stream=stream)
        return rollouts, self.ask_rewards(rollouts)

    def answer(self, prompts: Sequence[Prompt], *, samples: int, stream: str) -> list[Rollout]:
        """Rollouts as in ``examine``, not judged."""
        sampling = self.sampling if samples else dataclasses.replace(self.sampling, temperature=0.0)
        return self.engine.generate(self.requests(prompts, samples=samples or 1, stream=stream), sampling)

    def _evaluate(self, prompts: PromptBatch, stage: str) -> None:
        _, greedy = self.examine(list(prompts), stream=stage)
        self.scores.update(greedy)
        if self.val_samples:
            _, sampled = self.examine(list(prompts), samples=self.val_samples, stream=stage)
            self.scores.update(sampled, suffix="_sampled")

    def _report_scores(self, stage: str) -> None:
        scores = {f"{stage}/{name}": value for name, value in self.scores.compute().items()}
        self.log_dict(scores, sync_dist=True)  # equal on all ranks already; without it Lightning warns

    def on_validation_epoch_start(self) -> None:
        """Begin with empty scores."""
        self.scores = Scores(self.device)

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Answer and judge one batch."""
        with self.phase("validate"):
            self._evaluate(prompts, "val")

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``, ``val/reward``, ... and ``val/..._sampled``."""
        self._report_scores("val")

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Answer and judge one batch."""
        with self.phase("validate"):
            self._evaluate(prompts, "test")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, ``test/reward``, ..."""
        self._report_scores("test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> RolloutBatch:
        """The most likely answer of every prompt; no answer is needed to compare with."""
        return RolloutBatch(self.answer(list(prompts), samples=GREEDY, stream="predict"))
