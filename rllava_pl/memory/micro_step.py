"""Peak memory of one micro-step, traced with fake tensors through the package's own ``Policy`` at full depth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from rllava_pl.memory.fake_memory import FakeMemory
from rllava_pl.memory.fake_policy import fake_batch, fake_policy, layers_of
from rllava_pl.memory.settings import PlannedModel, PromptSize
from rllava_pl.models.policy import Policy
from rllava_pl.types import PolicyBatch

Peaks = tuple[tuple[float, float], ...]


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


@dataclass(frozen=True)
class StepPeaks:
    """Peaks of a micro-step between one layer boundary and the next, without and with complete gradients."""

    logprobs: Peaks
    update: Peaks

    def along(self, other: StepPeaks, distance: float) -> StepPeaks:
        """Peaks of another number of rows, ``distance`` times as far from this one as ``other`` is.

        Between two boundaries the peak is an affine function of the number of rows, unless another tensor becomes the
        largest; then the result is too low.
        """
        return StepPeaks(_along(self.logprobs, other.logprobs, distance), _along(self.update, other.update, distance))

    @property
    def bytes(self) -> StepBytes:
        """The largest peaks."""
        return StepBytes(
            update=round(max(alone for alone, _ in self.update)),
            update_with_gradients=round(max(with_gradients for _, with_gradients in self.update)),
            logprobs=round(max(alone for alone, _ in self.logprobs)),
        )


def _along(first: Peaks, second: Peaks, distance: float) -> Peaks:
    pairs = zip(first, second, strict=True)
    return tuple((a + distance * (c - a), b + distance * (d - b)) for (a, b), (c, d) in pairs)


@lru_cache(maxsize=256)
def step_peaks(step: MicroStep) -> StepPeaks:
    """Trace a forward without gradients, and a forward and backward.

    Raises:
        OSError: The model's config is neither shipped, nor on disk, nor on the hub.
    """
    memory, policies, batch = _fake_step(step)
    logprobs = _trace_logprobs(step, memory, policies, batch)
    with memory, memory.separate_gradients(nn.ModuleList(policies)):
        start = len(memory.peaks)
        memory.mark()
        _forward(step, policies, batch).backward()
    return StepPeaks(logprobs, tuple(memory.peaks[start:]))


@lru_cache(maxsize=256)
def logprobs_bytes(step: MicroStep) -> int:
    """Peak of the forward without gradients alone."""
    return max(alone for alone, _ in _trace_logprobs(step, *_fake_step(step)))


def _fake_step(step: MicroStep) -> tuple[FakeMemory, list[Policy], PolicyBatch]:
    memory = FakeMemory()
    policies = [fake_policy(step.model, memory.fake) for _ in range(2 if step.second_trunk else 1)]
    for policy in policies:
        memory.ignore(policy)
        for layer in layers_of(policy.model):
            layer.register_forward_pre_hook(memory.mark)
            layer.register_forward_hook(partial(_mark_after, memory))
    batch = fake_batch(
        policies[0],
        memory.fake,
        prompts=step.prompts,
        group_size=step.responses_per_prompt,
        response_tokens=step.response_tokens,
        prompt=step.prompt,
    )
    return memory, policies, batch


def _mark_after(memory: FakeMemory, layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Begin an interval behind a layer, and another one where its backward begins."""
    memory.mark()
    hidden = output if isinstance(output, Tensor) else output[0]
    if hidden.requires_grad:
        hidden.register_hook(memory.mark)


def _trace_logprobs(
    step: MicroStep, memory: FakeMemory, policies: list[Policy], batch: PolicyBatch
) -> tuple[tuple[int, int], ...]:
    with memory, torch.no_grad():
        _forward(step, policies, batch, entropy=False)
    return tuple(memory.peaks)


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
