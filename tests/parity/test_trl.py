"""The same completions through TRL's GRPOTrainer and through our modules: equal loss, equal gradient.

Nothing of TRL is imitated: its trainer scores the completions, takes advantages and old log-probs, shuffles, splits
into two micro-batches and accumulates; ours does the same in one. Both begin at one checkpoint, which is the reference
policy; both take old log-probs after a first shift of the weights, loss and gradient after a second one.

Where TRL 1.16 departs from the papers it is told not to, in ``PAPER`` and ``CASES``. What it cannot be told:

- It adds 1e-4 to the standard deviation, we 1e-6. Rewards are counted in thousands, so that neither is felt.
- Its log-probs are over the whole vocabulary, ours over what may be sampled. Here nothing is banned.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rllava_pl.modules import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, RLModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Experience, Prompt, PromptInputs, Rollout, Sampling, Score
from tests import runs
from tests.models.conftest import prompts

pytest.importorskip("trl", reason='parity is measured against TRL; pip install "rllava-pl[test]"')
from trl import GRPOConfig, GRPOTrainer

if not importlib.metadata.version("trl").startswith("1.16."):
    pytest.skip("the options below are those of TRL 1.16", allow_module_level=True)

GROUP_SIZE, MAX_TOKENS, TEMPERATURE = 4, 9, 1.5
LENGTHS = (9, 3, 1, 6, 2, 9, 5, 4, 7, 1, 8, 3)
REWARDS = (1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.75, 0.1, 0.0)
"""Of three groups of four; no two groups have the same mean or spread."""
STEP = 0.03
"""Of a weight's shift: ratios then lie between about 0.4 and 2, so that every range below is left on both sides."""

PAPER = {
    "use_bias_correction_kl": False,  # default: k3 is multiplied by the ratio; papers have plain k3
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "beta": 0.0,
    "epsilon": 0.2,
    "mask_truncated_completions": False,
    "use_vllm": False,  # and with it no weights between engine and trainer
}


@dataclass(frozen=True)
class Case:
    """One method in both packages."""

    algorithm: type[RLModule]
    theirs: dict[str, object]
    ours: dict[str, object] = field(default_factory=dict)
    unit: float = 1000.0
    """What a reward of 1 counts."""


NO_PUNISHMENT = {"overlong_buffer": 0.0}  # TRL has it as a reward function, not in its trainer
CASES = {
    # Default: loss_type "dapo" and beta 0.
    "grpo": Case(GRPO, {"loss_type": "grpo"}, {"kl_loss_coef": 0.0}),
    "grpo with KL": Case(GRPO, {"loss_type": "grpo", "beta": 0.5}, {"kl_loss_coef": 0.5}),
    # Default: epsilon_high equals epsilon.
    "dapo": Case(DAPO, {"loss_type": "dapo", "epsilon_high": 0.28}, NO_PUNISHMENT),
    # Default: loss_type "dr_grpo" alone still divides by the standard deviation.
    "dr_grpo": Case(DrGRPO, {"loss_type": "dr_grpo", "scale_rewards": "none"}, unit=1.0),
    # Default: the ratio of tokens; and the mean of tokens instead of that of sequences.
    "gspo": Case(
        GSPO,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    # Default: the largest weight is 0.2, epsilon_high being the weight itself and not its distance from 1.
    "cispo": Case(CISPO, {"loss_type": "cispo", "epsilon_high": 1.28}, {"clip_high": 0.28}),
    "sapo": Case(SAPO, {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
}


class Update(NamedTuple):
    """What one optimizer step would see."""

    loss: float
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class Completions:
    """Three prompts, each with a picture and a text of its own length, and four responses to each."""

    prompts: list[Prompt]
    inputs: list[PromptInputs]
    ids: list[Tensor]


class Listed(BaseReward):
    """The rewards of the table above."""

    def __init__(self, unit: float) -> None:
        super().__init__(unit)

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        return [Score(value) for value, _ in zip(REWARDS, rollouts, strict=True)]

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def trl_leaves_no_trace() -> Iterator[None]:
    """Its trainer seeds everything and notes the device of the process; later tests must not meet that."""
    from accelerate.state import AcceleratorState

    with mock.patch.dict(os.environ), torch.random.fork_rng(devices=[]):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def completions() -> Completions:
    policy = loaded(runs.module()).policy
    asked = prompts([1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(20, 200, (length,), generator=generator) for length in LENGTHS]
    return Completions(asked, policy.encode(asked), ids)


def loaded(module: RLModule) -> RLModule:
    module.configure_model()
    return module


def shift(model: nn.Module, seed: int) -> None:
    """Move all weights, the same way in any copy of the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += STEP * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)


def gradient(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Ours ----------------------------------------------------------------------------------------------------------------


def our_module(case: Case) -> RLModule:
    """Two epochs: the second one is off-policy, as TRL's second iteration."""
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
    options = {"minibatches": 1, "epochs": 2, "engine_correction": "none"} | case.ours
    module = loaded(runs.module(case.algorithm, sampling=sampling, group_size=GROUP_SIZE, **options))
    module.rewards = [Listed(case.unit)]
    module.policy.banned_ids = []
    if module.reference is not None:
        module.reference.banned_ids = []
    return module


def our_experience(module: RLModule, completions: Completions) -> Experience:
    """Judged and credited under the policy as it is now."""
    experience = module.judge([rollout(completions, n) for n in range(len(LENGTHS))])
    experience = experience.replace(old_logp_NT=module.score(module, experience).logp_NT)
    if module.needs_reference:
        experience = experience.replace(ref_logp_NT=module.score(module.reference, experience).logp_NT)
    return module.credit(experience)


def rollout(completions: Completions, n: int) -> Rollout:
    group, ids = n // GROUP_SIZE, completions.ids[n]
    return Rollout(
        prompt=completions.prompts[group],
        group=group,
        prompt_ids=completions.inputs[group].input_ids_S,
        inputs=completions.inputs[group],
        response_ids=ids,
        engine_logprobs=torch.zeros(len(ids)),
        response_mask=torch.ones(len(ids), dtype=torch.bool),
        finish_reason="stop",
        weight_version=0,
    )


def our_update(module: RLModule, experience: Experience) -> Update:
    module.zero_grad()
    loss = module.loss(module(experience.batch), experience, module.denominators(experience))
    loss.backward()
    return Update(loss.item(), gradient(module.policy.model))


# Theirs --------------------------------------------------------------------------------------------------------------


def their_trainer(case: Case, module: RLModule, completions: Completions, root: Path) -> GRPOTrainer:
    """At the same checkpoint; two micro-batches a step, two steps a rollout."""
    from datasets import Dataset

    rows = their_rows(completions)
    policy = module.source.load()
    arguments = GRPOConfig(
        output_dir=str(root),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(rows) // 2,
        gradient_accumulation_steps=2,
        num_iterations=2,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        temperature=TEMPERATURE,
        report_to="none",
        **(PAPER | case.theirs),
    )
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.processor,
        reward_funcs=lambda completions, **columns: [case.unit * reward for reward in REWARDS],
        rollout_func=lambda asked, trainer: their_rollouts(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in rows]}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps  # set in its epoch loop
    return trainer


def their_rows(completions: Completions) -> list[dict[str, object]]:
    """What TRL's data loader would give: every prompt once a completion."""
    return [
        {"prompt": [{"role": "user", "content": prompt.messages[0].parts[1]}], "images": list(prompt.images)}
        for prompt in completions.prompts
        for _ in range(GROUP_SIZE)
    ]


def their_rollouts(completions: Completions) -> dict[str, object]:
    return {
        "prompt_ids": [x.input_ids_S.tolist() for x in completions.inputs for _ in range(GROUP_SIZE)],
        "completion_ids": [ids.tolist() for ids in completions.ids],
        "logprobs": None,
    }


def their_update(trainer: GRPOTrainer) -> Update:
    """The second iteration over a rollout, whose first one was the shift."""
    trainer._step = trainer.args.steps_per_generation
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, None, None).item() for _ in range(2))
    return Update(loss, gradient(trainer.model))


# Both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(tmp_path: Path, completions: Completions, name: str) -> None:
    case = CASES[name]
    module = our_module(case)
    trainer = their_trainer(case, module, completions, tmp_path)
    for model in (module.policy.model, trainer.model):
        shift(model, seed=1)
    experience = our_experience(module, completions)
    trainer._prepare_inputs(their_rows(completions))
    for model in (module.policy.model, trainer.model):
        shift(model, seed=2)

    ours, theirs = our_update(module, experience), their_update(trainer)
    largest = max(x.abs().max() for x in theirs.gradient.values())
    print(name, ours.loss, theirs.loss, ours.loss-theirs.loss, "grad", float(largest), float(max((ours.gradient[k]-theirs.gradient[k]).abs().max() for k in theirs.gradient)/largest), ours.gradient.keys() ^ theirs.gradient.keys())
    out = module(experience.batch)
    r = (out.logp_NT - experience.old_logp_NT).exp()[experience.mask_NT]
    print(r.min(), r.max(), r.quantile(0.1), r.quantile(.9), module.cut_off(out.logp_NT, experience)[experience.mask_NT].float().mean())
    assert abs(ours.loss - theirs.loss) <= 1e-6
