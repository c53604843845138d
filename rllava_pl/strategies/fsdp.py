"""Fully sharded data parallelism, first generation: the parameters of a layer are flattened into one, and cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from rllava_pl.distributed.shards import Piece, gatherer, shifted
from rllava_pl.models.trainable import hf_weights
from rllava_pl.strategies import adapter as updates
from rllava_pl.strategies.ddp import RLStrategyMixin
from rllava_pl.strategies.sharding import LocalShards, make_room, units, values_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import FlatParamHandle
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
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        if self._wrapped is not None and self._wrapped.module is model:  # it stays wrapped between the stages of a run
            return self._wrapped
        values = values_of(model)
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
        _lazy_init(self._wrapped, self._wrapped)  # the first forward would do it; weights are asked for before
        self.fill(self._wrapped, values)
        return self._wrapped

    def reshard(self) -> None:
        """Cut again what a forward without a backward has left whole: what belongs to no layer."""
        from torch.distributed.fsdp._runtime_utils import _reshard

        if self._wrapped._handle is not None:
            _reshard(self._wrapped, self._wrapped._handle, free_unsharded_flat_param=True)

    def pieces(self) -> dict[int, Piece]:
        """A parameter lies somewhere in its unit's flat one, of which every rank holds an equal run."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        units = FullyShardedDataParallel.fsdp_modules(self._wrapped)
        return {key: piece for unit in units if unit._handle is not None for key, piece in _within(unit._handle)}


StrategyRegistry.register("rl_fsdp", RLFSDPStrategy, description="FSDP for steps with many forwards")


@updates.check.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> None:
    """Right: gradients are summed in shards, in every micro-batch."""


@updates.clip_gradients.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy, optimizer: Optimizer, max_norm: float) -> Tensor:
    return strategy.model.clip_grad_norm_(max_norm)  # type: ignore[no-any-return, operator]


@updates.full_weights.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    strategy.reshard()
    return hf_weights(model, gatherer(strategy.pieces(), strategy.root_device))


def _within(handle: FlatParamHandle) -> Iterator[tuple[int, Piece]]:
    """The pieces of one flat parameter while it is cut, by the ids of the parameters it was made of."""
    flat = handle.flat_param
    run = flat._sharded_size.numel()
    bounds = [run * r for r in range(handle.world_size + 1)]
    offsets = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
    starts = [start for (start, _), is_padding in offsets if not is_padding]
    for parameter, start, shape in zip(flat._params, starts, flat._shapes, strict=True):
        begin = start - bounds[handle.rank]  # seen from this rank's run
        own = flat.detach()[max(0, begin) : max(0, begin + shape.numel())]
        yield id(parameter), Piece(own, shifted(bounds, start, shape.numel()), shape)


@updates.parts.register(RLFSDPStrategy)
@contextmanager
def _(strategy: RLFSDPStrategy) -> Iterator[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(strategy.model, recurse=False, writeback=False):
        yield


@updates.in_step.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> bool:
    return True


@updates.loading.register(RLFSDPStrategy)
def _(strategy: RLFSDPStrategy) -> updates.Loading:
    return "waiting" if strategy.is_global_zero else "empty"
