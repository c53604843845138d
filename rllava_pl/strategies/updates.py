"""What an update needs of a strategy, in a few functions that each strategy answers in its own way.

Modules call these and stay blind to how weights are replicated or sharded. They dispatch on the strategy's class:
``@clip_gradients.register`` adds a strategy without touching a module. The defaults are right for a single device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor
from torch.optim import Optimizer

from rllava_pl.models.trainable import hf_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SUPPORTED = "use one of `auto`, `ddp`, `rl_ddp`"


@singledispatch
def check(strategy: Strategy) -> None:
    """Refuse a strategy whose gradients were not shown to be right; by default every one.

    Raises:
        ValueError: Saying why, and which strategy to use instead.
    """
    raise ValueError(f"{type(strategy).__name__} is not supported in this version; {_SUPPORTED}")


@check.register(SingleDeviceStrategy)
@check.register(DDPStrategy)
def _(strategy: Strategy) -> None:
    """Right as they are: every micro-batch goes through the wrapper, and gradients are exchanged in the last one."""


@singledispatch
def micro_batch(strategy: Strategy, *, last: bool) -> AbstractContextManager[None]:
    """Context around forward and backward of one micro-batch; gradients are exchanged in the last one only."""
    return nullcontext()


@singledispatch
def clip_gradients(strategy: Strategy, optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale the gradients so that their global L2 norm is at most ``max_norm``; returns the norm before, 0-dim.

    The norm is that of the whole model and equal on all ranks, so that all decide alike whether the step can be taken.
    """
    return torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)


@singledispatch
def discard_gradients(strategy: Strategy, optimizer: Optimizer) -> None:
    """Forget the gradients of the micro-batches since the last step; weights and moments stay as they are."""
    optimizer.zero_grad()


@singledispatch
def full_weights(strategy: Strategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Stream the whole model as ``(name in its state_dict, full tensor)``; all ranks must iterate together."""
    return hf_weights(model)


@micro_batch.register
def _(strategy: DDPStrategy, *, last: bool) -> AbstractContextManager[None]:
    return nullcontext() if last or strategy.model is None else strategy.model.no_sync()  # type: ignore[operator]


@check.register
def _(strategy: FSDPStrategy) -> None:
    raise ValueError(
        "FSDPStrategy runs training_step inside the wrapper's forward, where a second forward is an error, and cannot "
        f"clip by norm; {_SUPPORTED}"
    )


@check.register
def _(strategy: DeepSpeedStrategy) -> None:
    raise ValueError(
        "DeepSpeedStrategy adds up the gradients of several micro-batches wrongly, without an error, unless it is told "
        f"where an update ends, and clips by its own config alone; {_SUPPORTED}"
    )
