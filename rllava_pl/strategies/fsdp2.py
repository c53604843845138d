"""Fully sharded data parallelism, second generation: every parameter is cut along its first dimension."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rllava_pl.distributed.shards import Piece, even_bounds, gatherer
from rllava_pl.models.trainable import hf_weights
from rllava_pl.strategies import adapter as updates
from rllava_pl.strategies.ddp import RLStrategyMixin
from rllava_pl.strategies.sharding import LocalShards, make_room, units, values_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel


class RLFSDP2Strategy(RLStrategyMixin, LocalShards, ModelParallelStrategy):
    """Weights, gradients and optimizer states in equal parts on all ranks (``fully_shard``); gathered layer by layer.

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

    def setup_environment(self) -> None:
        """All ranks share the data; none splits a tensor's arithmetic."""
        updates.check_accelerator(self, self.allow_cpu)
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard, then go on as usual: optimizers see the shards."""
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(self.model, FSDPModule):  # it stays sharded between the stages of a run
            self.model = self.precision_plugin.convert_module(self.model)
            self._shard()
        super().setup(trainer)

    @property
    def root(self) -> FSDPModule:
        """The sharded module."""
        return cast("FSDPModule", self.model)

    def reshard(self) -> None:
        """Cut again what a forward without a backward has left whole."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def pieces(self) -> dict[int, Piece]:
        """Rows are cut: every rank holds equally many, the last ones fewer or none."""
        return {id(p): _piece(p) for p in self.lightning_module.parameters() if isinstance(p, DTensor)}

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        root, mesh = self.lightning_module, self.device_mesh["data_parallel"]
        values = values_of(root)
        make_room(root)
        for unit in units(root):
            fully_shard(unit, mesh=mesh)
        name = type(root).__name__
        fully_shard(root, mesh=mesh)
        type(root).__name__ = name  # as summaries and logs know the algorithm
        self.fill(root, values)
        self.root._get_fsdp_state()._lazy_init()  # the first module that runs would else take itself for the root


StrategyRegistry.register("rl_fsdp2", RLFSDP2Strategy, description="FSDP2 for steps with many forwards")


@updates.check.register(RLFSDP2Strategy)
def _(strategy: RLFSDP2Strategy) -> None:
    """Right: gradients are summed in shards, in every micro-batch."""


@updates.clip_gradients.register(RLFSDP2Strategy)
def _(strategy: RLFSDP2Strategy, optimizer: Optimizer, max_norm: float) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@updates.full_weights.register(RLFSDP2Strategy)
def _(strategy: RLFSDP2Strategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    strategy.reshard()
    return hf_weights(model, gatherer(strategy.pieces(), strategy.root_device))


def _piece(p: DTensor) -> Piece:
    """Rows as ``torch.chunk`` deals them out, each of ``numel / rows`` elements."""
    rows, ranks = p.shape[0], p.device_mesh.size()
    run = -(-rows // ranks) * (p.numel() // max(1, rows))
    return Piece(p.to_local().detach().flatten(), even_bounds(p.numel(), run), p.shape)


@updates.parts.register(RLFSDP2Strategy)
@contextmanager
def _(strategy: RLFSDP2Strategy) -> Iterator[None]:
    strategy.root.unshard()
    try:
        yield
    finally:
        strategy.root.reshard()


@updates.in_step.register(RLFSDP2Strategy)
def _(strategy: RLFSDP2Strategy) -> bool:
    return True


@updates.loading.register(RLFSDP2Strategy)
def _(strategy: RLFSDP2Strategy) -> updates.Loading:
    return "waiting" if strategy.is_global_zero else "empty"
