"""What flows through one pass of the RL loop: prompts, rollouts, batches.

Data flows one way: ``Prompt`` (data) -> ``Request`` -> ``Generation`` (engine) -> ``Rollout`` (episode) -> ``Score``
(rewards) -> ``ScoredBatch`` -> ``RewardedBatch`` (penalties) -> ``TrainingBatch`` (advantages). Everything here is
immutable; a stage returns a new object and never edits the one it was given.

Legend of the dimension suffixes used on tensors everywhere in the package:

====== ==========================================================================================
``P``  prompts of a batch
``G``  group size: completions sampled of one prompt
``N``  rows, ``N = P * G``, prompt-major: row ``p * G + g`` is sample ``g`` of prompt ``p``
``T``  response tokens, padded on the right to the longest response of the batch
``S``  tokens of one prompt, or of a prompt and its response
``V``  vocabulary
``H``  hidden width
====== ==========================================================================================
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]
Origin = Literal["sampled", "given", "observation"]
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value as it stood in the data."""


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
    """One message of a conversation, images as slots.

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
    answer: Json = None
    """What the rewards compare with, as it stood in the data; None where a task needs none."""
    target: str = ""
    """A response worth imitating: SFT target, demonstration beside rollouts, chosen one of a preference pair."""
    rejected: str = ""
    """The worse response of a preference pair; ``target`` is the better one."""
    metadata: Mapping[str, Json] = field(default_factory=dict)
    """Further columns of the row, as they stood in the data; for rewards, environments and tables."""
    source: str = ""
    """Where the row stands (file and row number), for error messages."""

    @property
    def answer_text(self) -> str:
        """The answer as text: a string as it is, None as "", any other value in JSON."""
        if self.answer is None:
            return ""
        return self.answer if isinstance(self.answer, str) else json.dumps(self.answer, ensure_ascii=False)


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
        return len(self.ids_T)


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


class MissingTensorError(LookupError):
    """An algorithm reads a tensor that nothing has computed for its batch."""


SOURCES: Mapping[str, str] = {
    "old_logp_NT": "declare needs_old_logp = True in the algorithm",
    "ref_logp_NT": "set kl.loss_coef or kl.reward_coef above 0, or declare needs_reference = True in the algorithm",
    "values_NT": "only algorithms with a critic have values: derive from ActorCritic",
    "returns_NT": "advantages() gives them: Credit(advantages, returns=...)",
    "selected_NT": "define select(minibatch) in the algorithm",
    "entropy_NT": "only losses have it: it belongs to the policy that is being trained",
}
"""How a batch comes to hold each tensor that only some algorithms need."""

BatchT = TypeVar("BatchT", bound="ScoredBatch")
Self = TypeVar("Self", bound="ScoredBatch")


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Rollouts and their scores as padded tensors, N rows, prompt-major, and each prompt's inputs once."""

    rollouts: tuple[Rollout, ...]
    """N, prompt-major."""
    inputs: tuple[PromptInputs, ...]
    """P: the multimodal inputs of each prompt, stored once."""
    group_size: int
    """Rows of each prompt: its samples, and what stands beside them, such as a demonstration."""
    group_N: Tensor
    """int64: equal for the rows of one baseline, unique over ranks; a row outside of a baseline is a group alone."""
    in_baseline_N: Tensor
    """bool: the row counts in statistics of its group."""
    response_ids_NT: Tensor
    """int64, right-padded with 0."""
    sampled_mask_NT: Tensor
    """bool: the policy sampled the token. Baselines and penalties read these."""
    trained_mask_NT: Tensor
    """bool: the token enters the losses, sampled or given."""
    engine_logp_NT: Tensor
    """float32: log-probs as the engine sampled, 0 at padding and at tokens it did not sample."""
    scores_N: Tensor
    """float32: weighted sum of the rewards; what decides whether a response is right."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 (N,) each: named parts of the rewards."""
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, T) each, by name: tensors that only some algorithms need, see ``SOURCES``; read them as attributes."""

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def given_mask_NT(self) -> Tensor:
        """bool: trained tokens that a demonstration or a hint gave."""
        return self.trained_mask_NT & ~self.sampled_mask_NT

    @property
    def own_mask_NT(self) -> Tensor:
        """bool: trained tokens that the policy sampled."""
        return self.trained_mask_NT & self.sampled_mask_NT

    @property
    def lengths_N(self) -> Tensor:
        """int64: sampled tokens of each row."""
        return self.sampled_mask_NT.sum(1)

    @property
    def old_logp_NT(self) -> Tensor:
        """float32: log-probs under the policy that sampled, in the trainer's arithmetic."""
        return self._computed("old_logp_NT")

    @property
    def ref_logp_NT(self) -> Tensor:
        """float32: log-probs under the reference policy."""
        return self._computed("ref_logp_NT")

    @property
    def values_NT(self) -> Tensor:
        """float32: the critic's values under the policy that sampled."""
        return self._computed("values_NT")

    @property
    def returns_NT(self) -> Tensor:
        """float32: what the critic is to predict."""
        return self._computed("returns_NT")

    @property
    def selected_NT(self) -> Tensor:
        """bool: tokens that a loss treats differently, chosen by ``select`` over the mini-batch of all ranks."""
        return self._computed("selected_NT")

    @property
    def entropy_NT(self) -> Tensor:
        """float32: entropies under the policy being trained, for losses that weigh by them."""
        return self._computed("entropy_NT")

    def _computed(self, name: str) -> Tensor:
        if name not in self.computed:
            raise MissingTensorError(f"this batch has no {name}; {SOURCES[name]}")
        return self.computed[name]

    def policy_batch(self, mask_NT: Tensor | None = None) -> PolicyBatch:
        """The forward's input for all of these rows; log-probs of the trained tokens unless another mask is given."""
        mask_NT = self.trained_mask_NT if mask_NT is None else mask_NT
        return PolicyBatch(self.inputs, self.group_size, self.response_ids_NT, mask_NT)

    def replace(self: Self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_computed(self: Self, **tensors: Tensor) -> Self:
        """A copy that holds these tensors as well, by the names in ``SOURCES``."""
        return self.replace(computed={**self.computed, **tensors})

    def to_stage(self, stage: type[BatchT], **tensors: Tensor) -> BatchT:
        """The same rows as a batch of a later stage, with the tensors which that stage adds."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return stage(**fields | tensors)

    def map(self: Self, change: TensorMap) -> Self:
        """A copy with ``change`` applied to every per-row tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes: dict[str, object] = {name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        for name in ("components", "computed"):
            changes[name] = {key: change(x) for key, x in getattr(self, name).items()}
        return self.replace(**changes)

    def select(self: Self, prompts: Sequence[int], members: Sequence[int] | None = None) -> Self:
        """The part with these prompts and these members of each group, cut to its longest response.

        Args:
            prompts: Positions in 0..P-1, in the order wanted.
            members: Which rows of each group; all by default.
        """
        kept = list(range(self.group_size)) if members is None else list(members)
        rows = [p * self.group_size + g for p in prompts for g in kept]
        index = torch.tensor(rows, dtype=torch.int64, device=self.trained_mask_NT.device)
        rollouts = tuple(self.rollouts[row] for row in rows)
        longest = max((len(rollout.response_ids) for rollout in rollouts), default=0)
        part = self.map(lambda x: x[index, :longest] if x.ndim == 2 else x[index])
        return part.replace(rollouts=rollouts, inputs=tuple(self.inputs[p] for p in prompts), group_size=len(kept))


@dataclass(frozen=True, kw_only=True)
class RewardedBatch(ScoredBatch):
    """A scored batch with penalties for length and KL divergence in its rewards; ``advantages`` reads it."""

    rewards_N: Tensor
    """float32: scores minus penalties."""
    token_rewards_NT: Tensor
    """float32: the same on tokens: the score on the last one, the KL penalty on every sampled one."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch(RewardedBatch):
    """A rewarded batch with the advantage of every token; ``policy_loss`` reads it."""

    advantages_NT: Tensor
    """float32: 0 outside of ``trained_mask_NT``."""


@dataclass(frozen=True)
class Credit:
    """What ``advantages`` may return where one tensor is not enough."""

    advantages: Tensor
    """Of each row (N,) or token (N, T)."""
    returns: Tensor | None = None
    """float32 (N, T): what a critic is to predict."""
    trained: Tensor | None = None
    """bool (N,): rows that stay in the losses; None: all that were."""


@dataclass(frozen=True)
class Term:
    """One named term of the loss: its weight, its tokens, and how they become one number."""

    mask_NT: Tensor
    """bool: tokens that count, in the sum and in the denominator."""
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"] = "token-mean"
    """See ``functional.reduce``."""
    weight: float = 1.0
    """Factor of the term in the loss."""


class TensorMap(Protocol):
    """A function from a per-row tensor to a per-row tensor."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The changed tensor."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the policy; it may live inside the trainer, in a process of its own or on a server.

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
