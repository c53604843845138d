"""Peak memory of one forward, and of one forward and backward, through the package's own ``Policy``.

The policy is made of fake tensors (``fake.py``) and has few layers. At every moment - before, in and behind each layer,
forward and backward - the live bytes are an affine function of the number of layers. So three small models give the
bytes at every moment of the full one, and the largest of those is its peak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from rllava_pl.memory.fake_memory import FakeMemory
from rllava_pl.memory.fake_policy import depths, layers_of, phantom_batch, phantom_policy
from rllava_pl.memory.settings import Prompts, Source
from rllava_pl.models.architectures import config_of
from rllava_pl.models.policy import Policy
from rllava_pl.types import PolicyBatch

TEXT_DEPTH, VISION_DEPTH = 5, 5
"""Layers of the smallest model: behind three special ones (deepstack), two that all others are like."""

Peaks = Mapping[tuple[str, str, str], tuple[float, float]]
"""Bytes at each moment, without and with kept gradients; layers by place (``first``, ``second``, ...)."""


@dataclass(frozen=True)
class Rows:
    """What goes through the model at once: ``prompts`` prompts with ``members`` responses each."""

    prompts: int
    members: int
    response_tokens: int
    prompt: Prompts


@dataclass(frozen=True)
class Computation:
    """What is computed with a model."""

    source: Source
    second_trunk: bool = False
    """A critic of its own, of the same shape, reads the same rows."""
    entropy_loss: bool = False
    autocast: bool = False
    """bf16 arithmetic on weights as they are."""


@dataclass(frozen=True)
class MicroStep:
    """Bytes on top of weights, buffers and optimizer states."""

    streamed: int
    """Peak of forward and backward, gradients that are complete not counted."""
    kept: int
    """The same with gradients that stay, from none on."""
    scoring: int
    """Peak of a forward without gradients."""

    @classmethod
    def of(cls, peaks: Peaks) -> MicroStep:
        """The largest of each kind over all moments."""
        update = [size for (stage, *_), size in peaks.items() if stage != "score"]
        scoring = [size for (stage, *_), (size, _) in peaks.items() if stage == "score"]
        return cls(
            streamed=round(max(without for without, _ in update)),
            kept=round(max(with_gradients for _, with_gradients in update)),
            scoring=round(max(scoring)),
        )


def peaks_of(computation: Computation, rows: Rows) -> Peaks:
    """Peaks of the full model.

    Raises:
        OSError: The model's config cannot be had.
    """
    source = computation.source
    depth = depths(config_of(source.path, source.revision))
    return extrapolated(lambda *few: traced(computation, rows, *few), depth, (TEXT_DEPTH, VISION_DEPTH))


def along(first: Peaks, second: Peaks, way: float) -> Peaks:
    """Peaks on the line through two sizes of micro-batch: ``first`` at 0, ``second`` at 1; affine at each moment."""
    return {
        moment: (a + way * (second[moment][0] - a), b + way * (second[moment][1] - b))
        for moment, (a, b) in first.items()
        if moment in second
    }


def extrapolated(at: Callable[[int, int], Peaks], depth: tuple[int, int], few: tuple[int, int]) -> Peaks:
    """Peaks at ``depth`` (text, vision) from those at ``few`` layers and at one layer more of either kind.

    f(L, D) = f(l, d) + (L - l)·(f(l + 1, d) - f(l, d)) + (D - d)·(f(l, d + 1) - f(l, d)) at each moment.
    """
    start = (min(depth[0], few[0]), min(depth[1], few[1]))
    base = at(*start)
    peaks = dict(base)
    for axis, missing in enumerate((depth[0] - start[0], depth[1] - start[1])):
        if missing:
            more = at(start[0] + (axis == 0), start[1] + (axis == 1))
            step = {moment: (more[moment][0] - a, more[moment][1] - b) for moment, (a, b) in base.items()}
            peaks = {m: (a + missing * step[m][0], b + missing * step[m][1]) for m, (a, b) in peaks.items()}
    return peaks


@lru_cache(maxsize=256)
def traced(computation: Computation, rows: Rows, layers: int, blocks: int) -> Peaks:
    """Peaks of a model with so many layers: a forward without gradients, then forward and backward."""
    memory = FakeMemory()
    policies = [phantom_policy(computation.source, memory.fake, layers, blocks)]
    if computation.second_trunk:
        policies.append(phantom_policy(computation.source, memory.fake, layers, blocks))
    for policy in policies:
        memory.ignore(policy)
    batch = phantom_batch(
        policies[0],
        memory.fake,
        prompts=rows.prompts,
        members=rows.members,
        response_tokens=rows.response_tokens,
        prompt=rows.prompt,
    )
    watch = _Watch(memory, policies)
    with memory:
        with torch.no_grad():
            watch.begin("score")
            _forward(policies, batch, computation)
        with memory.gradients_kept(nn.ModuleList(policies)):
            watch.begin("forward")
            loss = _forward(policies, batch, computation)
            watch.begin("backward")
            loss.backward()
    return watch.peaks()


def _forward(policies: list[Policy], batch: PolicyBatch, computation: Computation) -> torch.Tensor:
    """A loss with the cost of the real one: of its terms, only those that reach into the model matter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=computation.autocast, cache_enabled=False):  # as Lightning does
        policy, *critics = policies
        output = policy(batch)
        loss = output.logp_NT.sum()
        if computation.entropy_loss:
            loss = loss + output.entropy_NT.sum()
        for critic in critics:
            loss = loss + critic.hidden(batch).float().sum()
    return loss


class _Watch:
    """Tells ``memory`` which layer is running, in every pass; under gradient checkpointing also the recomputation."""

    def __init__(self, memory: FakeMemory, policies: list[Policy]) -> None:
        self.memory = memory
        self.stage = ""
        self.counts: dict[str, int] = {}
        for policy in policies:
            for kind, layers in layers_of(policy.model).items():
                self.counts[kind] = len(layers)
                for k, layer in enumerate(layers):
                    layer.register_forward_pre_hook(partial(self._enter, kind, k))
                    layer.register_forward_hook(partial(self._leave, kind, k))

    def begin(self, stage: str) -> None:
        """A pass begins."""
        self.stage = stage
        self._set("rest", 0)

    def _set(self, kind: str, k: int) -> None:
        self.memory.moment = (self.stage, kind, k)

    def _enter(self, kind: str, k: int, *_: object) -> None:
        self._set(kind, k)

    def _leave(self, kind: str, k: int, module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad and self.stage == "forward":
            hidden.register_hook(lambda _: self._set(kind, k))  # here the layer's backward begins
        if self.stage != "backward" and k == self.counts[kind] - 1:
            self._set("rest", 1)  # behind the last layer, up to the head

    def peaks(self) -> Peaks:
        """Peaks by place instead of by number, so that models of different depth can be compared."""
        peaks: dict[tuple[str, str, str], tuple[float, float]] = {}
        for (stage, kind, k), size in self.memory.peaks.items():
            n = self.counts.get(kind, 0)
            places = {"first": 0, "second": 1, "last but one": n - 2, "last": n - 1} if n else {str(k): k}
            for place in (place for place, number in places.items() if number == k):
                peaks[stage, kind, place] = size
        return peaks
