"""What a module needs of a strategy, in a few functions that each strategy answers in its own way.

Modules call these and stay blind to how weights are replicated or sharded. They dispatch on the strategy's class:
``@clip_gradients.register`` adds a strategy without touching a module. The defaults are right for a single device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor
from torch.optim import Optimizer

from rllava_pl.models.trainable import hf_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Loading = Literal["whole", "waiting", "empty"]
SUPPORTED = "use one of `auto`, `ddp`, `rl_ddp`, `rl_fsdp`, `rl_fsdp2`, `rl_deepspeed`"


@singledispatch
def check(strategy: Strategy) -> None:
    """Refuse a strategy whose gradients were not shown to be right; by default every one.

    Raises:
        ValueError: Saying why, and which strategy to use instead.
    """
    raise ValueError(f"{type(strategy).__name__} is not known to train rightly here; {SUPPORTED}")


@check.register(SingleDeviceStrategy)
@check.register(DDPStrategy)
def _(strategy: Strategy) -> None:
    """Right as they are: every micro-batch goes through the wrapper, and gradients are exchanged in the last one."""


def check_accelerator(strategy: ParallelStrategy, allow_cpu: bool) -> None:
    """Refuse a sharding strategy on CPUs unless it was asked for.

    Raises:
        ValueError: Naming the option.
    """
    if strategy.accelerator.name() == "cpu" and not allow_cpu:
        raise ValueError(
            f"{type(strategy).__name__} saves GPU memory and the accelerator is cpu; use `rl_ddp`, or allow_cpu: true "
            "to try it out"
        )


@runtime_checkable
class HoldsGradients(Protocol):
    """An optimizer that takes gradients out of the parameters while backward runs."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As ``clip_gradients``."""


def check_optimizer(strategy: Strategy, optimizer: Optimizer) -> None:
    """Refuse an optimizer that would leave a strategy no gradients to exchange.

    Raises:
        ValueError: Naming both, and what to use instead.
    """
    if isinstance(optimizer, HoldsGradients) and not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"{type(optimizer).__name__} takes gradients away before {type(strategy).__name__} can exchange them; use "
            "one device, or `rl_deepspeed` with offload_optimizer: true"
        )


@singledispatch
def micro_batch(strategy: Strategy, *, last: bool) -> AbstractContextManager[None]:
    """Context around forward and backward of one micro-batch; gradients are exchanged in the last one only."""
    return nullcontext()


@singledispatch
def clip_gradients(strategy: Strategy, optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale the gradients so that their global L2 norm is at most ``max_norm``; returns the norm before, 0-dim.

    The norm is that of the whole model and equal on all ranks, so that all decide alike whether the step can be taken.
    """
    if isinstance(optimizer, HoldsGradients):
        return optimizer.clip_grad_norm_(max_norm)
    return torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)


@singledispatch
def discard_gradients(strategy: Strategy, optimizer: Optimizer) -> None:
    """Forget the gradients of the micro-batches since the last step; weights and moments stay as they are."""
    optimizer.zero_grad()


@singledispatch
def restarts(strategy: Strategy) -> bool:
    """Whether a rank may give up an update before its last micro-batch, discard the gradients and begin again alone."""
    return False


@singledispatch
def full_weights(strategy: Strategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Stream the whole model as ``(name in its state_dict, full tensor)``; all ranks must iterate together."""
    return hf_weights(model)


@singledispatch
def parts(strategy: Strategy) -> AbstractContextManager[None]:
    """Context in which submodules may be called by themselves, without gradients, as the embedded engine does.

    Outside of it only the wrapper, ``trainer.strategy.model``, may be called: what it holds itself is sharded.
    """
    return nullcontext()


@singledispatch
def in_step(strategy: Strategy) -> bool:
    """Whether every call of a layer is a call on all ranks: they must then make equally many, of the same layers."""
    return False


@singledispatch
def loading(strategy: object) -> Loading:
    """What a policy holds before the strategy cuts it.

    ``whole``: its weights; ``waiting``: the same, but they may be left in the file, for they will be handed out;
    ``empty``: nothing, they will be received.
    """
    return "whole"


@restarts.register(SingleDeviceStrategy)
@restarts.register(DDPStrategy)
def _(strategy: Strategy) -> bool:
    return True  # no rank talks to another before the last micro-batch


@restarts.register
def _(strategy: DeepSpeedStrategy) -> bool:
    return False  # a DDPStrategy by descent alone


@micro_batch.register
def _(strategy: DDPStrategy, *, last: bool) -> AbstractContextManager[None]:
    return nullcontext() if last or strategy.model is None else strategy.model.no_sync()  # type: ignore[operator]


@check.register
def _(strategy: FSDPStrategy) -> None:
    raise ValueError(
        "FSDPStrategy runs training_step inside the wrapper's forward, where a second forward is an error, and cannot "
        f"clip by norm; {SUPPORTED}"
    )


@check.register
def _(strategy: DeepSpeedStrategy) -> None:
    raise ValueError(
        "DeepSpeedStrategy adds up the gradients of several micro-batches wrongly, without an error, unless it is told "
        f"where an update ends, and clips by its own config alone; {SUPPORTED}"
    )
