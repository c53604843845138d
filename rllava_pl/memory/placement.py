"""Where a strategy keeps weights, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

Home = Literal["gpu", "host"]
Part = Literal["weights", "gradients", "states"]


@dataclass(frozen=True)
class Placement:
    """What one rank holds, and where. Bytes are those of one trained parameter, before anything is cut."""

    name: str = "single"
    cut: frozenset[Part] = frozenset()
    """What is cut into as many parts as there are ranks."""
    weights: Home = "gpu"
    """Where weights rest while they are not used."""
    gradients: Home = "gpu"
    """Where gradients are summed."""
    states: Home = "gpu"
    """Where moments and master weights lie, and where the optimizer computes."""
    streams: bool = False
    """Whether a gradient leaves its parameter as soon as it is complete."""
    gradient_bytes: float = 0.0
    """Of the sums of gradients; 0: as wide as the weights."""
    moment_bytes: float = 0.0
    """0: what the optimizer itself keeps."""
    master_bytes: float = 0.0
    """Of a copy of the weights in higher precision."""
    spares_masters: bool = False
    """Whether fp32 weights that lie where the optimizer computes are their own masters."""
    gradient_copies: float = 0.0
    """Further copies of all gradients on the GPU, as a part of them."""
    whole_parameters: int = 0
    """Parameters that are whole at a time where weights are cut or rest on the host; 0: two layers and the root."""
    buffer_elements: int = 0
    """Elements of communication buffers, as wide as the weights."""


def single() -> Placement:
    """One device holds everything."""
    return Placement("single")


def ddp() -> Placement:
    """Everything on every rank, and gradients once more in the buckets they are exchanged in."""
    return Placement("rl_ddp", gradient_copies=1.0)


def fsdp(name: str = "rl_fsdp2") -> Placement:
    """Everything in parts; layers are gathered while they run, and gradients leave in every micro-batch."""
    return Placement(name, cut=frozenset({"weights", "gradients", "states"}), streams=True)


def deepspeed(
    stage: int = 3,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    reduce_bucket_size: int = 200_000_000,
    prefetch_bucket_size: int = 50_000_000,
    max_live_parameters: int = 1_000_000_000,
    **_: object,
) -> Placement:
    """ZeRO of a stage: fp32 master weights and moments; stage 1 cuts states, 2 gradients as well, 3 weights as well."""
    cut: list[Part] = ["states", "gradients", "weights"][:stage]  # type: ignore[assignment]
    states: Home = "host" if offload_optimizer else "gpu"
    return Placement(
        f"rl_deepspeed stage {stage}",
        cut=frozenset(cut),
        weights="host" if offload_parameters else "gpu",
        gradients=states,
        states=states,
        streams=stage >= 2,
        gradient_bytes=4.0 if offload_optimizer else 0.0,
        moment_bytes=8.0,
        master_bytes=4.0,
        whole_parameters=max_live_parameters + prefetch_bucket_size if stage == 3 else 0,
        buffer_elements=2 * reduce_bucket_size,
    )


def host_adamw(states: str = "float32", gradients: str = "float32") -> Placement:
    """``HostAdamW`` on one device: gradients are summed, and the optimizer runs, on the host."""
    master, moments = {"float32": (4.0, 8.0), "bfloat16": (4.0, 4.0), "int8": (0.0, 2.03)}[states]
    return Placement(
        f"single, HostAdamW {states}",
        gradients="host",
        states="host",
        streams=True,
        gradient_bytes=4.0 if gradients == "float32" else 2.0,
        moment_bytes=moments,
        master_bytes=master,
        spares_masters=True,
    )


def placement_of(strategy: str, options: Mapping[str, object]) -> Placement:
    """The placement of a strategy by its registered name or its class.

    Raises:
        ValueError: The plan does not know the strategy.
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
        f"no memory plan for the strategy {strategy!r}; it knows auto, rl_ddp, rl_fsdp, rl_fsdp2, rl_deepspeed"
    )
