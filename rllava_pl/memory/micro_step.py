"""Peak memory of one micro-step, traced with fake tensors through the package's own ``Policy`` at full depth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from rllava_pl.memory.fake_memory import FakeMemory
from rllava_pl.memory.fake_policy import fake_batch, fake_policy
from rllava_pl.memory.settings import PlannedModel, PromptSize
from rllava_pl.models.policy import Policy
from rllava_pl.types import PolicyBatch


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward: the models that take part, and the rows that go through them at once."""

    model: PlannedModel
    prompts: int
    responses_per_prompt: int
    response_tokens: int
    prompt: PromptSize
    second_trunk: bool = False
    """Whether a separate critic of the same shape reads the same rows."""
    entropy_loss: bool = False
    autocast: bool = False
    """Whether bf16 arithmetic is done with weights in another dtype."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes in addition to weights, buffers and optimizer states."""

    update: int
    """Peak of forward and backward without complete gradients."""
    update_with_gradients: int
    """The same with complete gradients, which start from none."""
    logprobs: int
    """Peak of a forward without gradients."""


@lru_cache(maxsize=256)
def step_bytes(step: MicroStep) -> StepBytes:
    """Trace a forward without gradients, and a forward and backward.

    Raises:
        OSError: The model's config is neither shipped, nor on disk, nor on the hub.
    """
    memory, policies, batch = _fake_step(step)
    with memory, memory.separate_gradients(nn.ModuleList(policies)):
        with torch.no_grad():
            _forward(step, policies, batch, entropy=False)
        memory.mark()
        _forward(step, policies, batch).backward()
    (logprobs, _), (update, with_gradients) = memory.peaks
    return StepBytes(update, with_gradients, logprobs)


@lru_cache(maxsize=256)
def logprobs_bytes(step: MicroStep) -> int:
    """Peak of the forward without gradients alone."""
    memory, policies, batch = _fake_step(step)
    with memory, torch.no_grad():
        _forward(step, policies, batch, entropy=False)
    return memory.peaks[0][0]


def _fake_step(step: MicroStep) -> tuple[FakeMemory, list[Policy], PolicyBatch]:
    memory = FakeMemory()
    policies = [fake_policy(step.model, memory.fake) for _ in range(2 if step.second_trunk else 1)]
    for policy in policies:
        memory.ignore(policy)
    batch = fake_batch(
        policies[0],
        memory.fake,
        prompts=step.prompts,
        group_size=step.responses_per_prompt,
        response_tokens=step.response_tokens,
        prompt=step.prompt,
    )
    return memory, policies, batch


def _forward(step: MicroStep, policies: list[Policy], batch: PolicyBatch, *, entropy: bool = True) -> Tensor:
    """A loss with the memory of the real one, to which only terms that reach into the model contribute."""
    with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast, cache_enabled=False):  # as Lightning does
        policy, *critics = policies
        output = policy(batch, entropy)
        loss: Tensor = output.logp_NT.sum()
        if entropy and step.entropy_loss:
            loss = loss + output.entropy_NT.sum()
        for critic in critics:
            loss = loss + critic.hidden(batch).float().sum()
    return loss
