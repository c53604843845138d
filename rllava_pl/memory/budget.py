"""Bytes of every phase of a run, on the GPU and on the host: arithmetic alone.

Every phase holds what rests (weights, reference, critic, optimizer states) and, for its time, what it makes. Lines
marked ``assumed`` are no arithmetic: context and libraries, fragmentation, what an engine keeps; they stand apart so
that a measurement can replace them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rllava_pl.memory.placement import Home
from rllava_pl.memory.settings import Settings
from rllava_pl.memory.units import GIB

CONTEXT_BYTES = round(0.6 * GIB)
"""CUDA context and libraries."""
FRAGMENT_BYTES = round(0.8 * GIB)
"""Holes in the caching allocator."""
ENGINE_BYTES = round(0.7 * GIB)
"""Workspace and CUDA graphs of vLLM, which stay while it sleeps."""
PROCESS_BYTES = 6 * GIB
"""Python, libraries, data and pinned buffers of the process, on the host."""
STAGING_BYTES = 2 * 64 * 2**20
"""Two pinned buffers through which gradients and weights pass."""
SAMPLER_BYTES = 24
"""Of one row and one entry of the vocabulary while a token is drawn: scores, log-probs and probabilities in fp32, their
sum in fp64, the logits themselves."""
OPTIONAL = ("reference", "sync")
"""Phases that some runs do not have."""


@dataclass(frozen=True)
class Line:
    """One item of a phase."""

    what: str
    gpu: int = 0
    host: int = 0
    assumed: bool = False


@dataclass(frozen=True)
class Phase:
    """All items of a phase."""

    name: str
    lines: tuple[Line, ...]

    @property
    def gpu(self) -> int:
        """Bytes on the GPU."""
        return sum(line.gpu for line in self.lines)

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return sum(line.host for line in self.lines)


@dataclass(frozen=True)
class Shapes:
    """Sizes of one model."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    largest: int
    """Parameters of the largest tensor."""
    layer: int
    """Parameters of the largest layer, gathered as a whole where weights are cut."""
    root: int
    """Parameters outside layers."""
    buffer_bytes: int
    weight_bytes: int
    """Of one parameter: 2 or 4."""
    kv_bytes: int
    """Keys and values of one token, in the dtype of the weights."""
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer needs for one trained parameter."""

    moment_bytes: float
    scratch_bytes: float
    """Largest temporaries of a step."""


@dataclass(frozen=True)
class Steps:
    """Bytes that computations make on top of what rests; see ``MicroStep``."""

    streamed: int
    kept: int
    scoring: int
    prefill: int
    """Reading the prompts of a rollout, without gradients."""


def phases(shapes: Shapes, settings: Settings, steps: Steps, optimizer: OptimizerCost) -> list[Phase]:
    """All phases, in the order of a pass."""
    budget = _Budget(shapes, settings, steps, optimizer)
    own = {
        "load": budget.load(),
        "rollout": budget.rollout(),
        "reference": budget.reference() if settings.evaluates else [],
        "update": budget.update(),
        "optimizer": budget.optimizer_step(),
        "sync": budget.sync(),
        "save": budget.save(),
    }
    weights, states, assumed = budget.weights(), budget.states(), budget.assumed()

    def all_lines(name: str, lines: list[Line]) -> tuple[Line, ...]:
        resting = weights if name == "load" else [*weights, *states]  # states are made by the first step
        found = [line for line in [*resting, *lines, *assumed] if line.gpu or line.host]
        if settings.device == "cpu":  # one memory for everything
            found = [Line(line.what, host=line.gpu + line.host, assumed=line.assumed) for line in found]
        return tuple(found)

    return [Phase(name, all_lines(name, lines)) for name, lines in own.items() if lines or name not in OPTIONAL]


def kv_cache_bytes(rows: int, tokens: int, kv_bytes: int) -> int:
    """Keys and values of ``rows`` sequences.

    >>> kv_cache_bytes(16, 2048, 147_456) / 2**30  # Qwen3-VL-4B in bf16
    4.5
    """
    return rows * tokens * kv_bytes


class _Budget:
    """The lines of each phase."""

    def __init__(self, shapes: Shapes, settings: Settings, steps: Steps, optimizer: OptimizerCost) -> None:
        self.shapes, self.settings, self.steps, self.optimizer = shapes, settings, steps, optimizer
        self.placement = settings.placement
        self.on_gpu = settings.device == "cuda"
        self.trunks = 2 if settings.critic == "separate" else 1
        self.trained = shapes.trained * self.trunks

    # -- what rests --------------------------------------------------------------------------------------------------

    def weights(self) -> list[Line]:
        """What is there from the start."""
        place, shapes = self.placement, self.shapes
        size = self._cut("weights", shapes.parameters * shapes.weight_bytes + shapes.buffer_bytes)
        lines = [self._at(place.weights, "weights", size)]
        if self.settings.critic == "separate":
            lines.append(self._at(place.weights, "critic", size))
        if self.settings.reference:
            lines.append(self._at(place.weights, "reference policy", size))
        return lines

    def states(self) -> list[Line]:
        """What the first step adds."""
        place = self.placement
        moments = self.trained * (place.moment_bytes or self.optimizer.moment_bytes)
        spared = place.spares_masters and not self.on_gpu and self.shapes.weight_bytes == 4
        masters = 0.0 if spared else self.trained * place.master_bytes
        lines = [
            self._at(place.states, "optimizer moments", self._cut("states", moments)),
            self._at(place.states, "master weights", self._cut("states", masters)),
            Line("communication buffers", gpu=place.buffer_elements * self.shapes.weight_bytes),
        ]
        if place.gradients == "host":
            lines.append(Line("sums of gradients", host=self._cut("gradients", self._gradients)))
            lines.append(Line("pinned staging buffers", host=STAGING_BYTES if self.on_gpu else 0))
        return lines

    def assumed(self) -> list[Line]:
        """What no arithmetic gives."""
        if not self.on_gpu:
            return []
        lines = [
            Line("context and libraries", gpu=CONTEXT_BYTES, assumed=True),
            Line("fragmentation", gpu=FRAGMENT_BYTES, assumed=True),
            Line("process, libraries, data", host=PROCESS_BYTES, assumed=True),
        ]
        if self.settings.engine.kind == "vllm":
            lines.append(Line("vLLM's workspace and graphs", gpu=ENGINE_BYTES, assumed=True))
        return lines

    @property
    def _gradients(self) -> float:
        return self.trained * (self.placement.gradient_bytes or self.shapes.weight_bytes)

    def _cut(self, part: str, size: float) -> int:
        return round(size / self.settings.ranks) if part in self.placement.cut else round(size)

    def _at(self, home: Home, what: str, size: int) -> Line:
        return Line(what, gpu=size) if home == "gpu" else Line(what, host=size)

    def _gathered(self) -> Iterable[Line]:
        """Weights that are whole while they are used."""
        place, shapes = self.placement, self.shapes
        if "weights" not in place.cut and place.weights == "gpu":
            return []
        whole = place.whole_parameters or 2 * shapes.layer + shapes.root
        return [Line("gathered weights", gpu=min(whole, shapes.parameters * self.trunks) * shapes.weight_bytes)]

    # -- the engine --------------------------------------------------------------------------------------------------

    def _engine_weights(self) -> int:
        return self.shapes.parameters * self.settings.engine.dtype_bytes

    def _engine(self, *, sampling: bool) -> list[Line]:
        """VLLM while it samples, and between rollouts."""
        engine = self.settings.engine
        if engine.kind != "vllm":
            return []
        resident = sampling or engine.memory in ("resident", "release_kv")
        lines = [Line("vLLM's weights", gpu=self._engine_weights())] if resident else []
        if sampling or engine.memory == "resident":
            lines.append(Line("vLLM's KV cache", gpu=engine.kv_bytes))
        if engine.memory == "sleep":
            lines.append(Line("vLLM's sleeping weights", host=self._engine_weights()))
        return lines

    def _embedded(self) -> list[Line]:
        """The embedded engine: at its peak it reads prompts, or draws last tokens, one layer of the cache twice."""
        shapes, settings = self.shapes, self.settings
        prompts = min(settings.engine.batch_prompts, settings.batch_prompts)
        rows, length = prompts * settings.group, settings.prompts.tokens
        cache = kv_cache_bytes(rows, length + settings.max_tokens, shapes.kv_bytes)
        reading = [
            Line("KV cache of prompts", gpu=kv_cache_bytes(prompts, length, shapes.kv_bytes)),
            Line("reading prompts", gpu=self.steps.prefill),
        ]
        drawing = [
            Line("KV cache", gpu=cache),
            Line("KV cache that grows", gpu=cache // shapes.layers),
            Line("drawing tokens", gpu=rows * shapes.vocabulary * SAMPLER_BYTES),
        ]
        return max(reading, drawing, key=lambda lines: sum(line.gpu for line in lines))

    # -- phases ------------------------------------------------------------------------------------------------------

    def load(self) -> list[Line]:
        """Weights pass through the host, one copy a process that reads them."""
        whole = self.shapes.parameters * self.shapes.weight_bytes
        return [Line("weights on their way", host=whole if self.on_gpu else 0), *self._engine(sampling=False)]

    def rollout(self) -> list[Line]:
        """Sampling."""
        kind = self.settings.engine.kind
        lines = self._embedded() if kind == "embedded" else self._engine(sampling=True)
        return [*lines, *(self._gathered() if kind == "embedded" else [])]

    def reference(self) -> list[Line]:
        """Log-probs without gradients: old policy, reference, values."""
        return [Line("activations", gpu=self.steps.scoring), *self._gathered(), *self._engine(sampling=False)]

    def update(self) -> list[Line]:
        """Forward and backward of one micro-batch, behind others where there are several."""
        place, kept = self.placement, self.placement.gradients == "gpu"
        gradients = self._cut("gradients", self._gradients) if kept else 0
        if place.streams or self.settings.accumulates:
            work = self.steps.streamed
        else:  # gradients appear as activations go
            gradients, work = 0, self.steps.kept
        return [
            Line("gradients", gpu=gradients),
            Line("activations and temporaries" if gradients or not kept else "activations and gradients", gpu=work),
            Line("gradients in buckets", gpu=round(place.gradient_copies * self._gradients)),
            *self._gathered(),
            *self._engine(sampling=False),
        ]

    def optimizer_step(self) -> list[Line]:
        """The step; on the host it works in small pieces."""
        gradients = self._cut("gradients", self._gradients) if self.placement.gradients == "gpu" else 0
        scratch = self._cut("states", self.optimizer.scratch_bytes) if self.placement.states == "gpu" else 0
        return [
            Line("gradients", gpu=gradients),
            Line("gradients in buckets", gpu=round(self.placement.gradient_copies * self._gradients)),
            Line("temporaries of the step", gpu=scratch),
            *self._engine(sampling=False),
        ]

    def sync(self) -> list[Line]:
        """Weights on their way to the engine: one tensor, and one layer that the engine takes apart."""
        if self.settings.engine.kind == "embedded":
            return []
        largest = self.shapes.largest * self.shapes.weight_bytes
        lines = [Line("tensor on its way", gpu=largest)]
        if self.settings.engine.kind == "server":
            return [*lines, Line("tensor as bytes", host=2 * largest)]
        layer = max(self.shapes.layer * self.shapes.weight_bytes, largest)
        return [*lines, Line("layer the engine repacks", gpu=layer), *self._engine(sampling=False), *self._woken()]

    def _woken(self) -> list[Line]:
        asleep = self.settings.engine.memory in ("sleep", "discard")
        return [Line("vLLM's weights", gpu=self._engine_weights())] if asleep else []

    def save(self) -> list[Line]:
        """Tensors stream to disk one at a time."""
        largest = self.shapes.largest * max(4, self.shapes.weight_bytes)
        return [Line("tensor on its way", host=largest if self.on_gpu else 0), *self._engine(sampling=False)]
