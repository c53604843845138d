"""What flows through one pass of the RL loop: prompts, rollouts, experience.

Data flows one way: ``Prompt`` (data) -> ``Request`` -> ``Rollout`` (engine) -> ``Score`` (rewards) -> ``Experience``
(advantages, loss). Everything here is immutable; a stage returns a new object and never edits the one it was given.

Legend of the dimension suffixes used on tensors everywhere in the package:

====== ==========================================================================================
``P``  prompts of a batch
``G``  group size: completions sampled of one prompt
``N``  samples, ``N = P * G``, prompt-major: row ``p * G + g`` is sample ``g`` of prompt ``p``
``T``  response tokens, padded on the right to the longest response of the batch
``S``  tokens of one prompt, or of a prompt and its response
``V``  vocabulary
``H``  hidden width
====== ==========================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class ImageSlot:
    """The place of the prompt's next image inside a message."""


IMAGE = ImageSlot()
"""The one image slot; ``Message("user", (IMAGE, "Which digit is it?"))``."""


class Markup(str):
    """Text in which special tokens of the model are meant; in plain ``str`` they are only spelled, and stay text.

    Example: ``Message("user", (IMAGE, Markup("Find <|object_ref_start|>the cat<|object_ref_end|>.")))``. Tokens that
    stand for pictures stay text here, too: a picture is an image slot.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, images as slots.

    Example: ``Message("user", (IMAGE, "Which digit is it?"))``.
    """

    role: Role
    """Who speaks."""
    parts: tuple[str | ImageSlot, ...]
    """Text and image slots in reading order; the k-th slot of a prompt stands for its k-th image."""

    @classmethod
    def parse(cls, role: Role, text: str, slot: str = "<image>") -> Message:
        """Split ``text`` at every ``slot``: ``parse("user", "<image>Which?")`` has the parts ``(IMAGE, "Which?")``."""
        pieces = text.split(slot)
        parts: list[str | ImageSlot] = [pieces[0]]
        for piece in pieces[1:]:
            parts += [IMAGE, piece]
        return cls(role, tuple(part for part in parts if part != ""))

    @property
    def image_slots(self) -> int:
        """Number of images this message shows."""
        return sum(isinstance(part, ImageSlot) for part in self.parts)


@dataclass(frozen=True)
class Prompt:
    """An initial state of the decision process: a conversation that waits for the policy's answer.

    Example: ``Prompt("digits:17", (Message("user", (IMAGE, "Which digit is it?")),), images=(scan,), answer="4")``.
    """

    uid: str
    """Identifies the row (same text, same images), unique in its dataset; seeds derive from it, not from content."""
    messages: tuple[Message, ...]
    """The conversation so far; the last message is not the assistant's."""
    images: tuple[Image, ...] = ()
    """Decoded RGB images, one for every image slot, in the order of the slots."""
    answer: str = ""
    """What the rewards compare with; empty where a task needs none."""
    target: str = ""
    """A response worth imitating: SFT target, demonstration beside rollouts, chosen one of a preference pair."""
    rejected: str = ""
    """The worse response of a preference pair; ``target`` is the better one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the row, for rewards, environments and tables."""
    source: str = ""
    """Where the row stands (file and row number), for error messages."""


Item = TypeVar("Item")


class Batch(Generic[Item]):
    """An immutable sequence that Lightning passes on untouched.

    It is deliberately no list and no dataclass: Lightning walks through collections to move and cast tensors, and
    refuses frozen dataclasses on the way. ``None`` entries (the padding that keeps ranks in step) are dropped.
    """

    def __init__(self, items: Iterable[Item | None]) -> None:
        self._items = tuple(item for item in items if item is not None)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)


class PromptBatch(Batch[Prompt]):
    """The prompts of one rollout, as a data loader hands them to ``training_step``.

    Use it as ``collate_fn``: ``DataLoader(prompts, 32, collate_fn=PromptBatch)``.
    """


@dataclass(frozen=True)
class PromptInputs:
    """One prompt as the model reads it: token ids and image tensors, without padding."""

    input_ids_S: Tensor
    """int64 (S,); every image placeholder expanded to its number of image tokens."""
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs that run along the tokens, (S,) each; e.g. ``mm_token_type_ids``."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """Vision inputs of this prompt alone, in the layout of its family; empty without images. E.g. ``pixel_values``."""

    def __len__(self) -> int:
        return len(self.input_ids_S)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: softmax of logits / temperature over the allowed tokens.

    The trainer's log-probs are defined by the same numbers, so what cannot be mirrored there is refused here.

    Args:
        max_tokens: Response budget in tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only 1.0: a truncated distribution is not the one whose log-probs are trained.
        top_k: Only 0 (all tokens), for the same reason.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {self.max_tokens}; a response needs a budget of at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; use 0 (greedy) or a positive number")
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"sampling.top_p={self.top_p}, top_k={self.top_k}: truncated sampling draws from another distribution "
                "than the one whose log-probs are trained, which biases every update; use top_p=1.0 and top_k=0"
            )


@dataclass(frozen=True)
class Request:
    """One prompt to complete ``len(seeds)`` times."""

    prompt: Prompt
    inputs: PromptInputs
    """The trainer's view of the prompt; an engine that tokenises by itself must arrive at the same ids."""
    group: int
    """Equal for all samples of this prompt instance, distinct otherwise."""
    seeds: tuple[int, ...]
    """One a sample; equal seeds give equal samples whatever else is in the batch."""
    prefix_ids: tuple[int, ...] = ()
    """Tokens every response begins with, given and not sampled: the hint of a demonstration."""


@dataclass(frozen=True)
class Turn:
    """A stretch of response tokens the policy sampled in one go: ``response_ids[start:stop]``."""

    start: int
    stop: int


@dataclass(frozen=True)
class Rollout:
    """One sampled episode, exactly as the engine produced it; token ids are the truth, text is for people and rewards.

    Example: prompt "Which digit is it?", ``response_ids = [261, 23, 262, 2]`` (``<answer>4</answer><|im_end|>``),
    ``engine_logprobs = [-0.1, -2.3, 0.0, 0.0]``, ``response_mask`` all True, ``finish_reason = "stop"``.
    """

    prompt: Prompt
    group: int
    """Rollouts of the same prompt instance carry the same number."""
    prompt_ids: Tensor
    """int64 (S,): what the engine conditioned on, placeholders expanded."""
    inputs: PromptInputs
    """The same prompt as the trainer reads it; its ids equal ``prompt_ids``."""
    response_ids: Tensor
    """int64 (T,): every token after the prompt, the end token included."""
    engine_logprobs: Tensor
    """float32 (T,): log-probs of the sampled tokens under the engine's sampling distribution; 0 where not sampled."""
    response_mask: Tensor
    """bool (T,): True where the token may be trained: the policy sampled it, or a demonstration gave it."""
    finish_reason: FinishReason
    """``stop``: an end token; ``length``: the budget ran out; ``abort``: the engine gave up."""
    weight_version: int
    """Number of policy updates in the weights that sampled this."""
    text: str = ""
    """Decoded response without special tokens; for rewards and people, never tokenised again."""
    turns: tuple[Turn, ...] = ()
    """The policy's stretches of the response; a single-turn rollout has one."""
    demo_mask: Tensor | None = None
    """bool (T,): True where a demonstration gave the token; None: the policy sampled all of them."""


class RolloutBatch(Batch[Rollout]):
    """What ``predict_step`` returns: the answers to one batch of prompts."""


@dataclass(frozen=True)
class Score:
    """What a reward says of one rollout."""

    value: float | None
    """The reward before its weight; None: it could not be scored (then ``reason`` says why), never a silent 0."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Named parts for the log, e.g. ``{"accuracy": 1.0, "format": 1.0}``."""
    reason: str = ""
    """Cause, in one or two words, if ``value`` is None; samples are counted by it."""
    detail: str = ""
    """What happened, for the log, e.g. the exception."""
    flags: tuple[str, ...] = ()
    """What should be counted though there is a value, in one or two words each, e.g. ``grader_timeout``."""


@dataclass(frozen=True)
class PolicyBatch:
    """Input of the policy's forward: P prompts and their N = P * G responses."""

    inputs: tuple[PromptInputs, ...]
    """P prompts; each is computed once, whatever G is."""
    group_size: int
    response_ids_NT: Tensor
    """int64, padded on the right with any id."""
    mask_NT: Tensor
    """bool; True where a log-prob is wanted."""


class PolicyOutput(NamedTuple):
    """Output of the policy's forward; a tuple, so that sharding wrappers find its tensors."""

    logp_NT: Tensor
    """float32: log π(token | prompt, earlier tokens); finite everywhere, 0 at padding."""
    entropy_NT: Tensor
    """float32: entropy in nats of the distribution each token was drawn from; 0 at padding."""
    values_NT: Tensor | None = None
    """float32: a critic's value of the state each token was drawn in; 0 at padding, None without a critic."""


@dataclass(frozen=True)
class Experience:
    """What one rollout taught: padded tensors for N samples, prompt-major, and each prompt's inputs once.

    Fields appear as the stages fill them; a later field is None until its stage has run or when the algorithm
    does not need it.
    """

    rollouts: tuple[Rollout, ...]
    """N, prompt-major."""
    inputs: tuple[PromptInputs, ...]
    """P: the multimodal inputs of each prompt, stored once."""
    group_size: int
    group_N: Tensor
    """int64: equal for rollouts of one prompt instance, unique over ranks."""
    response_ids_NT: Tensor
    """int64, right-padded with 0."""
    mask_NT: Tensor
    """bool: trainable, sampled by the policy or given by a demonstration."""
    demo_mask_NT: Tensor
    """bool: the part of ``mask_NT`` that a demonstration gave; all False in pure RL."""
    engine_logp_NT: Tensor
    """float32: log-probs as the engine sampled, 0 at padding and at tokens it did not sample."""
    rewards_N: Tensor
    """float32: weighted sum of the rewards, as judged; penalties enter the advantages alone."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 (N,) each: named parts of the rewards."""
    old_logp_NT: Tensor | None = None
    """float32: log-probs under the policy that sampled, in the trainer's arithmetic."""
    ref_logp_NT: Tensor | None = None
    """float32: log-probs under the reference policy."""
    token_rewards_NT: Tensor | None = None
    """float32: the reward on the last trainable token, the KL penalty on every one; what token estimators add up."""
    values_NT: Tensor | None = None
    """float32: the critic's values under the policy that sampled."""
    returns_NT: Tensor | None = None
    """float32: what the critic is to predict."""
    advantages_NT: Tensor | None = None
    """float32: credit of every token, 0 at padding."""
    selected_NT: Tensor | None = None
    """bool: tokens a loss treats apart, chosen over the whole mini-batch."""
    entropy_NT: Tensor | None = None
    """float32: entropies under the policy being trained, for losses that weigh by them."""

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def batch(self) -> PolicyBatch:
        """The forward's input for all of this experience."""
        return PolicyBatch(self.inputs, self.group_size, self.response_ids_NT, self.mask_NT)

    @property
    def own_mask_NT(self) -> Tensor:
        """bool: trainable tokens that the policy sampled itself."""
        return self.mask_NT & ~self.demo_mask_NT

    @property
    def lengths_N(self) -> Tensor:
        """int64: trainable tokens of each sample."""
        return self.mask_NT.sum(1)

    def replace(self, **changes: object) -> Experience:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, change: TensorMap) -> Experience:
        """A copy with ``change`` applied to every per-sample tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes: dict[str, object] = {name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        changes["components"] = {name: change(x) for name, x in self.components.items()}
        return self.replace(**changes)

    def select(self, prompts: Sequence[int], members: Sequence[int] | None = None) -> Experience:
        """The part with these prompts and these members of each group, cut to its longest response.

        Args:
            prompts: Positions in 0..P-1, in the order wanted.
            members: Which samples of each group; all by default.
        """
        kept = list(range(self.group_size)) if members is None else list(members)
        rows = [p * self.group_size + g for p in prompts for g in kept]
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask_NT.device)
        rollouts = tuple(self.rollouts[row] for row in rows)
        longest = max((len(rollout.response_ids) for rollout in rollouts), default=0)
        part = self.map(lambda x: x[index, :longest] if x.ndim == 2 else x[index])
        return part.replace(rollouts=rollouts, inputs=tuple(self.inputs[p] for p in prompts), group_size=len(kept))


class TensorMap(Protocol):
    """A function from a per-sample tensor to a per-sample tensor."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The changed tensor."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws responses from the policy; it may live inside the trainer, in a process of its own or on a server."""

    @property
    def exact(self) -> bool:
        """True when its log-probs are the trainer's own to rounding (same weights, same arithmetic)."""

    @property
    def version(self) -> int:
        """Number of policy updates in its weights; -1 before the first sync."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Complete every request ``len(request.seeds)`` times; rollouts come in the order of requests and seeds."""

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
    """Judges rollouts; any importable class with these members serves, ``BaseReward`` spares the loop."""

    weight: float
    """Factor in the sum of rewards."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout, in order; deterministic."""
