"""What the training loop needs of a strategy: one adapter class for each way to distribute a model.

Strategies differ in when gradients are exchanged, how their norm is clipped and how weights are stored. The loop gets
an adapter from ``adapter_for`` and works with its members alone; it never asks for the class of a strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from rllava_pl.models.trainable import hf_weights

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PreTrainedModel

LoadMode = Literal["full", "lazy", "empty"]

SUPPORTED = "use one of `auto`, `ddp`, `rl_ddp`, `rl_fsdp`, `rl_fsdp2`, `rl_deepspeed`"
REFUSED: dict[type[Strategy], str] = {
    FSDPStrategy: "runs training_step inside the wrapper's forward, where a second forward is an error, and cannot "
    "clip by norm",
    DeepSpeedStrategy: "accumulates the gradients of several micro-batches incorrectly, without an error, and clips "
    "by its config only",
}
"""Strategies of Lightning that do not train correctly here, and why."""


@runtime_checkable
class HoldsGradients(Protocol):
    """An optimizer that moves gradients out of the parameters during the backward pass."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As ``StrategyAdapter.clip_grad_norm``."""


class StrategyAdapter:
    """Forward, backward, clipping and weights under one strategy; as it stands, on a single device.

    Args:
        strategy: Of the trainer that runs.
    """

    can_retry = True
    """Whether a rank may abort an update before its last micro-batch, discard the gradients and repeat it alone."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    @property
    def model(self) -> nn.Module:
        """The wrapped module; every forward of the policy goes through it."""
        return self.strategy.model

    @property
    def lockstep(self) -> bool:
        """Whether calling a layer is a collective: all ranks must then call the same layers equally often."""
        return False

    @property
    def load_mode(self) -> LoadMode:
        """What a policy holds on this rank before the strategy shards it.

        ``full``: its weights. ``lazy``: weights that may stay in their file, because they will be distributed.
        ``empty``: no weights, because they will be received.
        """
        return "full"

    def check(self) -> None:
        """Refuse, with a ValueError, settings under which the strategy cannot train."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse, with a ValueError, an optimizer that would leave no gradients to exchange."""
        if isinstance(optimizer, HoldsGradients) and isinstance(self.strategy, ParallelStrategy):
            raise ValueError(
                f"{type(optimizer).__name__} moves gradients away before {type(self.strategy).__name__} can exchange "
                "them; use one device, or `rl_deepspeed` with offload_optimizer: true"
            )

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Context around forward and backward of one micro-batch; ``last``: of the micro-batches of an update."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a loss; what ``LightningModule.manual_backward`` does."""
        self.strategy.backward(loss, None)

    def clip_grad_norm(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Scale the gradients so that their global L2 norm is at most ``max_norm``; returns the norm before, 0-dim.

        The norm is that of the whole model and equal on all ranks, so that all of them make the same decision about
        the step.
        """
        if isinstance(optimizer, HoldsGradients):
            return optimizer.clip_grad_norm_(max_norm)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def discard_gradients(self, optimizer: Optimizer) -> None:
        """Delete the gradients of all micro-batches since the last step; weights and moments are unchanged."""
        optimizer.zero_grad()

    def full_weights(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Stream the model as ``(name in its state_dict, full tensor)``, one tensor at a time; collective."""
        return hf_weights(model)

    def unsharded(self) -> AbstractContextManager[None]:
        """Context in which submodules may be called directly, without gradients, as the embedded engine does.

        Outside of it only ``model`` may be called: parameters that belong to no layer are sharded.
        """
        return nullcontext()


class DDPAdapter(StrategyAdapter):
    """A full copy on every rank; gradients are exchanged in the last micro-batch."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Without exchange unless it is the last micro-batch."""
        if last or self.strategy.model is None:
            return nullcontext()
        return cast("DistributedDataParallel", self.strategy.model).no_sync()


def adapter_for(strategy: Strategy) -> StrategyAdapter:
    """The adapter of a strategy; a ValueError if its gradients are wrong or unverified here."""
    name = type(strategy).__name__
    if adapter_class := cast("type[StrategyAdapter] | None", getattr(strategy, "adapter_class", None)):
        return adapter_class(strategy)
    for kind, reason in REFUSED.items():
        if isinstance(strategy, kind):
            raise ValueError(f"{name} {reason}; {SUPPORTED}")
    if isinstance(strategy, DDPStrategy):
        return DDPAdapter(strategy)
    if isinstance(strategy, SingleDeviceStrategy):
        return StrategyAdapter(strategy)
    raise ValueError(f"{name} is not supported: its gradients are unverified here; {SUPPORTED}")
