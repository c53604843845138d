"""Rollouts: what is asked of an engine, what it returns, the episodes made of it, and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rllava_pl.types.prompts import Batch, Prompt, PromptInputs, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

FinishReason = Literal["stop", "length", "abort"]
Origin = Literal["sampled", "given", "observation"]


@dataclass(frozen=True)
class Request:
    """One prompt to complete ``len(seeds)`` times."""

    prompt: Prompt
    inputs: PromptInputs
    """The trainer's view of the prompt; an engine that tokenises by itself must arrive at the same ids."""
    group: int
    """Equal for all samples of this prompt instance, distinct otherwise; at least 0."""
    seeds: tuple[int, ...]
    """One a sample; equal seeds give equal samples whatever else is in the batch."""
    prefix_ids: tuple[int, ...] = ()
    """Tokens every response begins with, given and not sampled: the hint of a demonstration."""


@dataclass(frozen=True)
class Generation:
    """What an engine sampled for one handle in one turn: token ids with their log-probs, and why it ended."""

    handle: int
    """Of the sample, as ``RolloutEngine.start`` numbered it."""
    prompt_ids: Tensor
    """int64 (S,): what the engine conditioned on, image placeholders expanded, without the tokens given with it."""
    ids_T: Tensor
    """int64 (T,): the sampled tokens, the end token included."""
    logprobs_T: Tensor
    """float32 (T,): log-probs of these tokens under the engine's sampling distribution."""
    finish_reason: FinishReason
    """``stop``: an end token; ``length``: the budget ran out; ``abort``: the engine gave up."""
    weight_version: int
    """Number of policy updates in the weights that sampled this."""


@dataclass(frozen=True)
class Segment:
    """A run of an episode's tokens behind the prompt, all of one origin.

    Example: ``Segment(ids_T=tensor([261, 23, 262, 2]), logprobs_T=tensor([-0.1, -2.3, 0.0, 0.0]), weight_version=7)``
    is one sampled turn of four tokens; ``Segment(tensor([9, 10]), "given")`` the hint it continued.
    """

    ids_T: Tensor
    """int64 (T,)."""
    origin: Origin = "sampled"
    """``sampled``: by the policy; ``given``: by a demonstration or a hint; ``observation``: by an environment."""
    logprobs_T: Tensor | None = None
    """float32 (T,): log-probs of sampled tokens under the engine's sampling distribution; None for other origins."""
    weight_version: int = -1
    """Number of policy updates in the weights that sampled this; -1 for other origins."""
    images: tuple[Image, ...] = ()
    """Pictures that an observation shows, in the order of their placeholders in ``ids_T``."""

    def __len__(self) -> int:
        return self.ids_T.numel()  # a tenth of the time of len(tensor), which is Python


@dataclass(frozen=True)
class Rollout:
    """One episode; token ids are the truth, text is for people and rewards.

    An episode is a sequence of segments behind one prompt. A single-turn response is one sampled segment; a response
    that continued a hint is a given and a sampled one; a demonstration is one given segment.
    """

    prompt: Prompt
    group: int
    """Rollouts of the same prompt instance carry the same number."""
    inputs: PromptInputs
    """The prompt as the trainer reads it."""
    segments: tuple[Segment, ...]
    """Everything behind the prompt, in order."""
    finish_reason: FinishReason = "stop"
    """Why the last turn ended; see ``Generation.finish_reason``."""
    text: str = ""
    """Decoded response without special tokens; for rewards and people, never tokenised again."""
    step_rewards: tuple[float, ...] = ()
    """Rewards of an environment, one a sampled segment; empty without an environment."""
    in_baseline: bool = True
    """Whether the row counts in statistics of its group, such as the mean that advantages are measured from."""
    trained: bool = True
    """Whether its sampled and given tokens enter the losses."""

    @cached_property
    def response_ids(self) -> Tensor:
        """int64 (T,): every token behind the prompt, the end token included."""
        return _joined([segment.ids_T for segment in self.segments])

    @cached_property
    def engine_logprobs(self) -> Tensor:
        """float32 (T,): log-probs of the sampled tokens under the engine's sampling distribution; 0 at others."""
        return _joined(
            [torch.zeros(len(s), dtype=torch.float32) if s.logprobs_T is None else s.logprobs_T for s in self.segments]
        )

    @cached_property
    def sampled_mask(self) -> Tensor:
        """Bool (T,): True where the policy sampled the token."""
        return _joined([torch.full((len(s),), s.origin == "sampled") for s in self.segments])

    @cached_property
    def trained_mask(self) -> Tensor:
        """Bool (T,): True where the token enters the losses: sampled or given, in a row that is trained."""
        return _joined([torch.full((len(s),), self.trained and s.origin != "observation") for s in self.segments])

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Number of policy updates in the weights that sampled each sampled segment."""
        return tuple(segment.weight_version for segment in self.segments if segment.origin == "sampled")


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


class RolloutBatch(Batch[Rollout]):
    """What ``predict_step`` returns: the answers to one batch of prompts."""


@dataclass(frozen=True)
class Score:
    """What a reward says of one rollout: a number, "does not apply", or "could not be scored".

    ``Score(1.0)`` is a number. ``Score.not_applicable()`` says that the reward does not apply to this row; the other
    rewards decide. ``Score(None, reason="...")`` says that the row could not be scored; it is counted by its reason and
    never becomes a silent 0.
    """

    value: float | None
    """The reward before its weight; None: it could not be scored, or the reward does not apply."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Named parts for the log, e.g. ``{"accuracy": 1.0, "format": 1.0}``."""
    reason: str = ""
    """Cause, in one or two words, if it could not be scored; samples are counted by it."""
    detail: str = ""
    """What happened, for the log, e.g. the exception."""
    flags: tuple[str, ...] = ()
    """What should be counted though there is a value, in one or two words each, e.g. ``grader_timeout``."""
    applicable: bool = True
    """False: the reward does not apply to this row."""

    @classmethod
    def not_applicable(cls) -> Score:
        """The reward does not apply to this row."""
        return cls(None, applicable=False)


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the policy; it may live inside the trainer, in a separate process or on a server.

    ``start`` hands in requests, ``advance`` returns finished turns until all handles have ended. Episodes of several
    turns add two calls, which come with environments: ``extend(handle, ids, images)`` appends an observation behind a
    finished turn and lets the handle sample again, ``finish(handle)`` frees what the engine keeps for it.
    """

    @property
    def exact(self) -> bool:
        """True when its log-probs are the trainer's own to rounding (same weights, same arithmetic)."""

    @property
    def version(self) -> int:
        """Number of policy updates in its weights; -1 before the first sync."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """Begin ``len(request.seeds)`` samples of every request; one handle each, in the order of requests and seeds.

        Whatever an earlier ``start`` left unfinished is dropped.
        """

    def advance(self) -> list[Generation]:
        """Turns that have finished since the last call; waits for at least one while any is under way."""

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's full weights, named as in the transformers model's ``state_dict``."""

    def sleep(self) -> None:
        """Hand back memory until the next ``wake``."""

    def wake(self) -> None:
        """Be ready to generate."""

    def close(self) -> None:
        """Free everything; idempotent."""


@runtime_checkable
class Reward(Protocol):
    """Scores rollouts; any importable class with these members serves, ``BaseReward`` spares the loop."""

    weight: float
    """Factor in the sum of rewards."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout, in order; deterministic."""
