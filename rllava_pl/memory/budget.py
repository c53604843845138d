"""Bytes of every phase of a run, on the GPU and on the host, as plain arithmetic.

Every phase holds what is kept throughout (weights, reference, critic, optimizer states) and what it needs itself. Items
marked ``assumed`` are not computed: context and libraries, fragmentation, what an engine keeps. They are listed
separately so that a measurement can replace them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rllava_pl.memory.micro_step import StepBytes
from rllava_pl.memory.placement import Memory, Part
from rllava_pl.memory.settings import PlanSettings
from rllava_pl.memory.units import GIB

CONTEXT_BYTES = round(0.6 * GIB)
"""CUDA context and libraries."""
FRAGMENT_BYTES = round(0.8 * GIB)
"""Fragmentation of the caching allocator."""
ENGINE_BYTES = round(0.7 * GIB)
"""Workspace and CUDA graphs of vLLM, which stay while it sleeps."""
PROCESS_BYTES = 6 * GIB
"""Python, libraries, data and pinned buffers of the process, on the host."""
STAGING_BYTES = 2 * 64 * 2**20
"""Two pinned buffers through which gradients and weights are copied."""
SAMPLER_BYTES = 24
"""Per row and vocabulary entry while a token is sampled: logits, and scores, log-probs and probabilities in fp32, their
sum in fp64."""


@dataclass(frozen=True)
class MemoryItem:
    """One item of a phase."""

    what: str
    gpu: int = 0
    host: int = 0
    assumed: bool = False


@dataclass(frozen=True)
class PhaseMemory:
    """All items of a phase."""

    name: str
    items: tuple[MemoryItem, ...]

    @property
    def gpu(self) -> int:
        """Bytes on the GPU."""
        return sum(item.gpu for item in self.items)

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return sum(item.host for item in self.items)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model."""

    parameters: int
    trained: int
    """Trained parameters."""
    largest: int
    """Parameters of the largest tensor."""
    layer: int
    """Parameters of the largest layer, which is gathered as a whole where weights are sharded."""
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
    """What an optimizer needs for its states and its step."""

    moment_bytes: float
    """Per trained parameter."""
    scratch_bytes: float
    """Largest temporaries of a step."""


def phases(
    size: ModelSize, settings: PlanSettings, step: StepBytes, prefill_bytes: int, optimizer: OptimizerCost
) -> list[PhaseMemory]:
    """All phases, in the order in which they run; ``prefill_bytes``: of the embedded engine's forward over prompts."""
    budget = _Budget(size, settings, step, prefill_bytes, optimizer)
    own = {
        "load": budget.load(),
        "rollout": budget.rollout(),
        "logprobs": budget.logprobs() if settings.computes_logprobs else [],
        "update": budget.update(),
        "optimizer": budget.optimizer_step(),
        "sync": budget.sync(),
        "save": budget.save(),
    }
    weights, states, assumed = budget.weights(), budget.states(), budget.assumed()

    def all_items(name: str, items: list[MemoryItem]) -> tuple[MemoryItem, ...]:
        kept = weights if name == "load" else [*weights, *states]  # the first step creates the states
        found = [*kept, *items, *budget.vllm(sampling=name == "rollout"), *assumed]
        if settings.device == "cpu":  # one memory for everything
            found = [MemoryItem(item.what, host=item.gpu + item.host, assumed=item.assumed) for item in found]
        return tuple(item for item in found if item.gpu or item.host)

    optional = ("logprobs", "sync")  # some runs do not have these phases
    return [PhaseMemory(name, all_items(name, items)) for name, items in own.items() if items or name not in optional]


def kv_cache_bytes(rows: int, tokens: int, kv_bytes: int) -> int:
    """Keys and values of ``rows`` sequences.

    >>> kv_cache_bytes(16, 2048, 147_456) / 2**30  # Qwen3-VL-4B in bf16
    4.5
    """
    return rows * tokens * kv_bytes


class _Budget:
    """The items of each phase."""

    def __init__(
        self, size: ModelSize, settings: PlanSettings, step: StepBytes, prefill_bytes: int, optimizer: OptimizerCost
    ) -> None:
        self.size, self.settings, self.step, self.optimizer = size, settings, step, optimizer
        self.prefill_bytes = prefill_bytes
        self.placement, self.engine = settings.placement, settings.engine
        self.on_gpu = settings.device == "cuda"
        self.trunks = 2 if settings.critic == "separate" else 1
        self.trained = size.trained * self.trunks
        self.gradient_bytes = self.trained * (self.placement.gradient_bytes or size.weight_bytes)
        self.engine_weights = size.parameters * self.engine.dtype_bytes

    def _shard(self, part: Part, size: float) -> int:
        return round(size / self.settings.ranks) if part in self.placement.sharded else round(size)

    @staticmethod
    def _in(memory: Memory, what: str, size: int) -> MemoryItem:
        return MemoryItem(what, gpu=size) if memory == "gpu" else MemoryItem(what, host=size)

    # -- what is kept throughout -------------------------------------------------------------------------------------

    def weights(self) -> list[MemoryItem]:
        """Weights of the policy, a separate critic and a reference."""
        place, size = self.placement, self.size
        one = self._shard("weights", size.parameters * size.weight_bytes + size.buffer_bytes)
        names = {"weights": True, "critic": self.trunks == 2, "reference policy": self.settings.reference}
        return [self._in(place.weights, name, one) for name, held in names.items() if held]

    def states(self) -> list[MemoryItem]:
        """What the first optimizer step adds."""
        place = self.placement
        moments = self.trained * (place.moment_bytes or self.optimizer.moment_bytes)
        reused = place.reuses_fp32_weights and not self.on_gpu and self.size.weight_bytes == 4
        masters = 0.0 if reused else self.trained * place.master_bytes
        items = [
            self._in(place.states, "optimizer moments", self._shard("states", moments)),
            self._in(place.states, "master weights", self._shard("states", masters)),
            MemoryItem("communication buffers", gpu=place.buffer_elements * self.size.weight_bytes),
        ]
        if place.gradients == "host":
            items.append(MemoryItem("accumulated gradients", host=self._shard("gradients", self.gradient_bytes)))
            items.append(MemoryItem("pinned staging buffers", host=STAGING_BYTES if self.on_gpu else 0))
        return items

    def assumed(self) -> list[MemoryItem]:
        """What cannot be computed."""
        if not self.on_gpu:
            return []
        items = [
            MemoryItem("context and libraries", gpu=CONTEXT_BYTES, assumed=True),
            MemoryItem("fragmentation", gpu=FRAGMENT_BYTES, assumed=True),
            MemoryItem("process, libraries, data", host=PROCESS_BYTES, assumed=True),
        ]
        if self.engine.kind == "vllm":
            items.append(MemoryItem("vLLM's workspace and graphs", gpu=ENGINE_BYTES, assumed=True))
        return items

    def _gathered(self) -> MemoryItem:
        """Weights that are gathered while they are used."""
        place, size = self.placement, self.size
        whole = min(place.gathered_parameters or 2 * size.layer + size.root, size.parameters * self.trunks)
        kept_on_gpu = place.weights == "gpu" and "weights" not in place.sharded
        return MemoryItem("gathered weights", gpu=0 if kept_on_gpu else whole * size.weight_bytes)

    # -- the engine --------------------------------------------------------------------------------------------------

    def vllm(self, *, sampling: bool) -> list[MemoryItem]:
        """What vLLM holds during a rollout, or between rollouts."""
        engine = self.engine
        if engine.kind != "vllm":
            return []
        resident = sampling or engine.memory in ("resident", "release_kv")
        cached = sampling or engine.memory == "resident"
        return [
            MemoryItem("vLLM's weights", gpu=self.engine_weights if resident else 0),
            MemoryItem("vLLM's KV cache", gpu=engine.kv_bytes if cached else 0),
            MemoryItem("vLLM's sleeping weights", host=self.engine_weights if engine.memory == "sleep" else 0),
        ]

    def _embedded(self) -> list[MemoryItem]:
        """The embedded engine at its peak: the forward over the prompts, or sampling with one layer's cache twice."""
        size, settings = self.size, self.settings
        prompts = min(self.engine.batch_prompts, settings.batch_prompts)
        rows, length = prompts * settings.group_rows, settings.prompt.tokens
        cache = kv_cache_bytes(rows, length + settings.max_tokens, size.kv_bytes)
        prefill = [
            MemoryItem("KV cache of prompts", gpu=kv_cache_bytes(prompts, length, size.kv_bytes)),
            MemoryItem("prefill", gpu=self.prefill_bytes),
        ]
        last_token = [
            MemoryItem("KV cache", gpu=cache),
            MemoryItem("copy of one layer's KV cache", gpu=cache // size.layers),
            MemoryItem("sampling tokens", gpu=rows * size.vocabulary * SAMPLER_BYTES),
        ]
        return max(prefill, last_token, key=lambda items: sum(item.gpu for item in items))

    # -- phases ------------------------------------------------------------------------------------------------------

    def load(self) -> list[MemoryItem]:
        """Weights are read on the host, one copy in every process that reads them."""
        whole = self.size.parameters * self.size.weight_bytes
        return [MemoryItem("weights being loaded", host=whole if self.on_gpu else 0)]

    def rollout(self) -> list[MemoryItem]:
        """The embedded engine samples."""
        return [*self._embedded(), self._gathered()] if self.engine.kind == "embedded" else []

    def logprobs(self) -> list[MemoryItem]:
        """Log-probs and values without gradients, of old policy and reference."""
        return [MemoryItem("activations", gpu=self.step.logprobs), self._gathered()]

    def update(self) -> list[MemoryItem]:
        """Forward and backward of one micro-batch, after others if there are several."""
        if self.placement.streams_gradients or self.settings.accumulates:
            activations = [self._gradients(), MemoryItem("activations and temporaries", gpu=self.step.update)]
        else:  # gradients appear while activations are freed
            activations = [MemoryItem("activations and gradients", gpu=self.step.update_with_gradients)]
        return [*activations, self._buckets(), self._gathered()]

    def optimizer_step(self) -> list[MemoryItem]:
        """The optimizer step; temporaries of a step on the host are negligible."""
        scratch = self._shard("states", self.optimizer.scratch_bytes) if self.placement.states == "gpu" else 0
        return [self._gradients(), self._buckets(), MemoryItem("temporaries of the step", gpu=scratch)]

    def _gradients(self) -> MemoryItem:
        held = self._shard("gradients", self.gradient_bytes) if self.placement.gradients == "gpu" else 0
        return MemoryItem("gradients", gpu=held)

    def _buckets(self) -> MemoryItem:
        return MemoryItem("gradients in buckets", gpu=round(self.placement.gradient_copies * self.gradient_bytes))

    def sync(self) -> list[MemoryItem]:
        """Weights are sent to the engine: one tensor at a time, and one layer that the engine repacks."""
        if self.engine.kind == "embedded":
            return []
        largest = self.size.largest * self.size.weight_bytes
        items = [MemoryItem("tensor being sent", gpu=largest)]
        if self.engine.kind == "server":
            return [*items, MemoryItem("tensor as bytes", host=2 * largest)]
        woken = self.engine_weights if self.engine.memory in ("sleep", "discard") else 0
        layer = max(self.size.layer * self.size.weight_bytes, largest)
        return [*items, MemoryItem("layer that vLLM repacks", gpu=layer), MemoryItem("vLLM's weights", gpu=woken)]

    def save(self) -> list[MemoryItem]:
        """Tensors are written to disk one at a time."""
        largest = self.size.largest * max(4, self.size.weight_bytes)
        return [MemoryItem("tensor being written", host=largest if self.on_gpu else 0)]
