"""One optimizer step on the same completions, by a module of ours and by TRL's GRPOTrainer.

Three prompts, each with a picture and a text of its own length, and four responses to each. Both sides begin at one
checkpoint, which is the reference policy. ``Ours`` and ``Theirs`` have the same three calls: ``shift`` the weights,
``remember`` advantages and old log-probs, ``update``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rllava_pl.loop.options import EngineCorrection
from rllava_pl.modules import RLModule
from rllava_pl.rewards import BaseReward
from rllava_pl.strategies.adapter import adapter_for
from rllava_pl.types import Prompt, PromptInputs, Rollout, Sampling, Score, Segment, TrainingBatch
from tests import runs
from tests.models.conftest import prompts
from tests.modules.passes import recording_updater

GROUP_SIZE, MAX_TOKENS, TEMPERATURE = 4, 16, 1.5
LENGTHS = (16, 3, 1, 11, 2, 16, 7, 4, 12, 1, 15, 6)
REWARDS = (1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.75, 0.1, 0.0)
"""Of three groups, no two with the same mean or spread."""
SHIFT = 0.15
"""Of a weight, in standard deviations of its tensor: ratios then lie between 0.34 and 3.1."""


class Update(NamedTuple):
    """What an optimizer would see."""

    loss: float
    gradient: dict[str, Tensor]

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.gradient[name].flatten() for name in sorted(self.gradient)])


@dataclass(frozen=True)
class Completions:
    """What both sides are given."""

    prompts: list[Prompt]
    inputs: list[PromptInputs]
    ids: list[Tensor]

    @classmethod
    def drawn(cls) -> Completions:
        module = runs.module(policy=runs.tiny(warmup_steps=0))
        module.configure_model()
        asked = prompts([1, 1, 1])
        generator = torch.Generator().manual_seed(3)
        ids = [torch.randint(20, 200, (length,), generator=generator) for length in LENGTHS]
        return cls(asked, module.policy.encode(asked), ids)


def shift(model: nn.Module, seed: int) -> None:
    """Move all weights at random, the same way in every copy of a model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight += SHIFT * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)


def gradient(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Listed(BaseReward):
    """The rewards of the table above."""

    components = ("accuracy",)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(value, {"accuracy": value}) for value, _ in zip(REWARDS, rollouts, strict=True)]

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError


class Ours:
    """A module, through its scores, advantages, losses and denominators, all rows at once."""

    batch: TrainingBatch

    def __init__(
        self, completions: Completions, algorithm: type[RLModule], *, reward_unit: float, **options: object
    ) -> None:
        self.completions = completions
        self.module = runs.module(
            algorithm,
            runs.tiny(warmup_steps=0),
            sampling=Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE),
            group_size=GROUP_SIZE,
            engine_correction=EngineCorrection(level="none"),
            rewards=[Listed(reward_unit)],
            **options,
        )
        self.module.trainer = runs.trainer(Path(tempfile.gettempdir()))  # for its strategy; it never runs
        self.module.configure_model()
        self.module.trainer.strategy.connect(self.module)
        self.module.engine = SimpleNamespace(exact=False)  # nothing is sampled
        self.module.updater.connect(adapter_for(self.module.trainer.strategy), Path(tempfile.gettempdir()))
        for policy in filter(None, (self.module.policy, self.module.reference)):
            policy.banned_ids = []  # TRL's log-probs are over all of the vocabulary

    def shift(self, seed: int) -> None:
        shift(self.module.policy.model, seed)

    def remember(self) -> None:
        """Score, log-probs and advantages, under the policy as it is now."""
        batch = self.module.score([self._rollout(n) for n in range(len(LENGTHS))])
        self.batch = self.module.compute_advantages(self.module.compute_logprobs(batch))

    def _rollout(self, n: int) -> Rollout:
        prompt, ids = n // GROUP_SIZE, self.completions.ids[n]
        return Rollout(
            prompt=self.completions.prompts[prompt],
            group=prompt,
            inputs=self.completions.inputs[prompt],
            segments=(Segment(ids, logprobs_T=torch.zeros(len(ids)), weight_version=0),),
        )

    def update(self) -> Update:
        """A whole step of the updater, with an optimizer that changes nothing."""
        updater, steps = recording_updater(self.module)
        steps.zero_grad = lambda: None  # the gradients stay where they can be read by name
        assert updater.step(self.batch, self.module.terms, self.module.losses)
        return Update(updater.metrics.means()["loss"], gradient(self.module.policy.model))

    def clip_fraction(self) -> float:
        """Fraction of the tokens on which the method's clipping acts."""
        logp_NT = self.module(self.batch.policy_batch()).logp_NT.detach().requires_grad_()
        clipped_NT = self.module.clipped_tokens(self.module.policy_loss(logp_NT, self.batch), logp_NT, self.batch)
        return clipped_NT[self.batch.trained_mask_NT].float().mean().item()


class Theirs:
    """TRL's trainer, through its own scoring, advantages, shuffling, micro-batches (two) and accumulation."""

    def __init__(
        self, completions: Completions, checkpoint: str, root: Path, *, reward_unit: float, **options: object
    ) -> None:
        from datasets import Dataset
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import GRPOConfig, GRPOTrainer

        self.completions = completions
        arguments = GRPOConfig(
            output_dir=str(root),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(LENGTHS) // 2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            temperature=TEMPERATURE,
            report_to="none",
            **options,
        )
        self.trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32"),
            processing_class=AutoProcessor.from_pretrained(checkpoint),
            reward_funcs=lambda completions, **columns: [reward_unit * reward for reward in REWARDS],
            rollout_func=lambda asked, trainer: self._rollouts(),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in self._rows()]}),
        )
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 2  # its epoch loop, which does not run here, would set it

    def _rows(self) -> list[dict[str, object]]:
        """What its data loader would give: every prompt once a completion."""
        return [
            {"prompt": [{"role": "user", "content": prompt.messages[0].parts[1]}], "images": list(prompt.images)}
            for prompt in self.completions.prompts
            for _ in range(GROUP_SIZE)
        ]

    def _rollouts(self) -> dict[str, object]:
        """What it would have generated."""
        return {
            "prompt_ids": [x.input_ids_S.tolist() for x in self.completions.inputs for _ in range(GROUP_SIZE)],
            "completion_ids": [ids.tolist() for ids in self.completions.ids],
            "logprobs": None,
        }

    def shift(self, seed: int) -> None:
        shift(self.trainer.model, seed)

    def remember(self) -> None:
        """Score and buffer, under the policy as it is now."""
        self.trainer._prepare_inputs(self._rows())

    def update(self) -> Update:
        """The second iteration over the rollout, which uses the log-probs of the first."""
        self.trainer._step = self.trainer.args.steps_per_generation
        self.trainer.model.zero_grad()
        loss = sum(self.trainer.training_step(self.trainer.model, None, None).item() for _ in range(2))
        return Update(loss, gradient(self.trainer.model))
