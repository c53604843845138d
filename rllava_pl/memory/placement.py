"""Where a strategy keeps weights, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

Memory = Literal["gpu", "host"]
Part = Literal["weights", "gradients", "states"]


@dataclass(frozen=True)
class Placement:
    """What one rank holds, and where; bytes are per trained parameter, before sharding."""

    name: str = "single"
    sharded: frozenset[Part] = frozenset()
    """What is split over the ranks."""
    weights: Memory = "gpu"
    """Where weights are kept while they are not used."""
    gradients: Memory = "gpu"
    """Where gradients are accumulated."""
    states: Memory = "gpu"
    """Where moments and master weights are kept, and where the optimizer runs."""
    streams_gradients: bool = False
    """Whether a gradient leaves its parameter as soon as it is complete."""
    gradient_bytes: float = 0.0
    """Of accumulated gradients; 0: as wide as the weights."""
    moment_bytes: float = 0.0
    """0: measured by a step of the optimizer."""
    master_bytes: float = 0.0
    """Of a copy of the weights in higher precision."""
    reuses_fp32_weights: bool = False
    """Whether fp32 weights serve as master weights where the optimizer runs on the device that holds them."""
    gradient_copies: float = 0.0
    """Further copies of all gradients on the GPU, as a fraction of their size."""
    gathered_parameters: int = 0
    """Parameters gathered at a time if weights are sharded or on the host; 0: two layers and all that is no layer."""
    buffer_elements: int = 0
    """Elements of communication buffers, as wide as the weights."""


def single() -> Placement:
    """Everything on one device."""
    return Placement("single")


def ddp() -> Placement:
    """Everything on every rank, and gradients a second time in communication buckets."""
    return Placement("rl_ddp", gradient_copies=1.0)


def fsdp(name: str = "rl_fsdp2") -> Placement:
    """Everything sharded; layers are gathered while they run, and gradients are reduced in every micro-batch."""
    return Placement(name, sharded=frozenset({"weights", "gradients", "states"}), streams_gradients=True)


def deepspeed(
    stage: int = 3,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    reduce_bucket_size: int = 200_000_000,
    prefetch_bucket_size: int = 50_000_000,
    max_live_parameters: int = 1_000_000_000,
    **_: object,
) -> Placement:
    """ZeRO with fp32 moments and master weights; stage 1 shards states, 2 also gradients, 3 also weights."""
    sharded: list[Part] = ["states", "gradients", "weights"][:stage]  # type: ignore[assignment]
    states: Memory = "host" if offload_optimizer else "gpu"
    return Placement(
        f"rl_deepspeed stage {stage}",
        sharded=frozenset(sharded),
        weights="host" if offload_parameters else "gpu",
        gradients=states,
        states=states,
        streams_gradients=stage >= 2,
        gradient_bytes=4.0 if offload_optimizer else 0.0,
        moment_bytes=8.0,
        master_bytes=4.0,
        gathered_parameters=max_live_parameters + prefetch_bucket_size if stage == 3 else 0,
        buffer_elements=2 * reduce_bucket_size,
    )


def host_adamw(states: str = "float32", gradients: str = "float32") -> Placement:
    """``HostAdamW`` on one device: gradients are accumulated, and the optimizer runs, on the host."""
    master, moments = {"float32": (4.0, 8.0), "bfloat16": (4.0, 4.0), "int8": (0.0, 2.03)}[states]
    return Placement(
        f"single, HostAdamW {states}",
        gradients="host",
        states="host",
        streams_gradients=True,
        gradient_bytes=4.0 if gradients == "float32" else 2.0,
        moment_bytes=moments,
        master_bytes=master,
        reuses_fp32_weights=True,
    )


def placement_of(strategy: str, options: Mapping[str, object]) -> Placement:
    """The placement of a strategy by its registered name or its class.

    Raises:
        ValueError: No placement is defined for the strategy.
    """
    name = strategy.rpartition(".")[2].lower().removesuffix("strategy").replace("_", "")
    if name in ("auto", "singledevice"):
        return single()
    if name in ("ddp", "rlddp"):
        return ddp()
    if name in ("rlfsdp", "rlfsdp2"):
        return fsdp(f"rl_{name.removeprefix('rl')}")
    if name == "rldeepspeed":
        return deepspeed(**cast("dict[str, bool]", dict(options)))
    raise ValueError(
        f"no memory plan for the strategy {strategy!r}; it must be auto, rl_ddp, rl_fsdp, rl_fsdp2 or rl_deepspeed"
    )
