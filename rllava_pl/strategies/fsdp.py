"""Fully sharded data parallelism, first generation: the parameters of a layer are flattened into one, and cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from rllava_pl.models.trainable import hf_weights
from rllava_pl.strategies import updates
from rllava_pl.strategies.ddp import RLStrategyMixin
from rllava_pl.strategies.sharding import LocalShards, make_room, units

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import PreTrainedModel


class RLFSDPStrategy(RLStrategyMixin, LocalShards, FSDPStrategy):
    """Weights, gradients and optimizer states in equal parts on all ranks; ``rl_fsdp2`` is its successor.

    Rank 0 alone reads the checkpoint, the others begin empty and receive their parts. Gradients are exchanged in every
    micro-batch, so that no rank ever holds those of the whole model.

    Args:
        allow_cpu: Run on CPU processes; for tests, it saves no memory there.
        process_group_backend: By default ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: After so long without an answer from another rank the run fails.
    """

    def __init__(
        self,
        allow_cpu: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.allow_cpu = allow_cpu
        self._wrapped: FullyShardedDataParallel | None = None

    def setup_environment(self) -> None:
        """As usual, where there are GPUs or CPUs will do."""
        updates.check_accelerator(self, self.allow_cpu)
        super().setup_environment()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap layer by layer; stock code takes no CPU for a device."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        if self._wrapped is not None and self._wrapped.module is model:  # it stays wrapped between the stages of a run
            return self._wrapped
        whole = model.state_dict() if self.is_global_zero else {}
        make_room(model)
        apart = {id(unit) for unit in units(model)}
        self._wrapped = FullyShardedDataParallel(
            module=model,
            device_id=self.root_device,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or id(module) in apart,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )
        self._fill(self._wrapped, whole)
        return self._wrapped

    def reshard(self) -> None:
        """Cut again what a forward without a backward has left whole: what belongs to no layer."""
        from torch.distributed.fsdp._runtime_utils import _reshard

        if self._wrapped._handle is not None:
            _reshard(self._wrapped, self._wrapped._handle, free_unsharded_flat_param=True)

    def _fill(self, wrapped: nn.Module, whole: Mapping[str, Tensor]) -> None:
        """Send the parameters of one unit after the other from rank 0; each rank keeps its part of them."""
        prefixes = {id(module): f"{name}." for name, module in wrapped.named_modules()}
        for modules in _opened(wrapped, writeback=True):
            for module in modules:
                for name, parameter in module.named_parameters(recurse=False):
                    if self.is_global_zero:
                        key = (prefixes[id(module)] + name).replace("_fsdp_wrapped_module.", "")
                        parameter.data.copy_(whole[key])
                    torch.distributed.broadcast(parameter.data, src=0)


StrategyRegistry.register("rl_fsdp", RLFSDPStrategy, description="FSDP for steps with many forwards")


@updates.check.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> None:
    """Right: gradients are summed in shards, in every micro-batch."""


@updates.clip_gradients.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy, optimizer: Optimizer, max_norm: float) -> Tensor:
    return strategy.model.clip_grad_norm_(max_norm)  # type: ignore[no-any-return, operator]


@updates.full_weights.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Unit by unit: what a layer holds, or what belongs to none, is gathered at a time."""
    for modules in _opened(strategy.model, writeback=False):
        yield from hf_weights(model, _copy, within={id(module) for module in modules})


def _copy(x: Tensor) -> Tensor:
    """A gathered parameter is freed with its unit."""
    return x.detach().clone()


def _opened(wrapped: nn.Module, *, writeback: bool) -> Iterator[list[nn.Module]]:
    """Gather one unit after the other; gives the modules whose own parameters are whole until the next is asked for."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = FullyShardedDataParallel.fsdp_modules(wrapped)
    unit_of = {id(module): unit for unit in units for module in unit.modules()}  # outer units first, so inner ones win
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
            yield [module for module in unit.modules() if unit_of[id(module)] is unit]


@updates.parts.register(RLFSDPStrategy)
@contextmanager
def _(strategy: RLFSDPStrategy) -> Iterator[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(strategy.model, recurse=False, writeback=False):
        yield


@updates.in_step.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> bool:
    return True


@updates.reads_weights.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> bool:
    return strategy.is_global_zero
