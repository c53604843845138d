"""Fully sharded data parallelism, both generations.

``RLFSDPStrategy`` flattens the parameters of a layer into one and shards that (``FullyShardedDataParallel``);
``RLFSDP2Strategy`` shards every parameter along its first dimension (``fully_shard``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rllava_pl.checkpoint import dcp
from rllava_pl.checkpoint.codec import Plain
from rllava_pl.distributed.shards import Shard, bounds_within, broadcast, even_bounds
from rllava_pl.strategies.adapter import LoadMode, StrategyAdapter, adapter_for
from rllava_pl.strategies.sharding import (
    ShardedAdapter,
    ShardedStrategy,
    empty_state,
    initial_values,
    materialize,
    restore_state,
    sharding_units,
    state_tensors,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

WRAPPER = "_fsdp_wrapped_module."
"""What the first generation adds to the names of parameters."""
WEIGHTS, OPTIMIZER = "weights/", "optimizer/"
"""Beginnings of the names of saved tensors."""


class FSDPAdapter(ShardedAdapter):
    """First generation."""

    strategy: RLFSDPStrategy
    lockstep = True

    @property
    def load_mode(self) -> LoadMode:
        """Rank 0 reads the weights, the other ranks receive their shards."""
        return "lazy" if self.strategy.is_global_zero else "empty"

    def clip_grad_norm(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """By the wrapper, which adds up the norms of all ranks."""
        return cast("FullyShardedDataParallel", self.model).clip_grad_norm_(max_norm)

    def unsharded(self) -> AbstractContextManager[None]:
        """Gather the parameters that belong to no layer."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel.summon_full_params(self.model, recurse=False, writeback=False)


class FSDP2Adapter(FSDPAdapter):
    """Second generation."""

    strategy: RLFSDP2Strategy  # type: ignore[assignment]

    def clip_grad_norm(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """By torch's function, whose norm of sharded gradients is itself sharded."""
        norm = StrategyAdapter.clip_grad_norm(self, optimizer, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather the parameters that belong to no layer."""
        self.strategy.root.unshard()
        try:
            yield
        finally:
            self.strategy.root.reshard()


class FullyShardedStrategy(ShardedStrategy):
    """Base of both generations: weights, gradients and optimizer states are sharded over all ranks.

    Rank 0 alone reads the checkpoint of the model, the other ranks receive their shards. Gradients are exchanged in
    every micro-batch, so that no rank ever holds those of the whole model.

    Args:
        allow_cpu: Run on CPU processes; for tests, it saves no memory there.
        process_group_backend: By default ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: The run fails when another rank does not answer for so long.
    """

    adapter_class: ClassVar[type[StrategyAdapter]] = FSDPAdapter

    def __init__(
        self,
        allow_cpu: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)  # type: ignore[call-arg]
        self.allow_cpu = allow_cpu

    def setup_environment(self) -> None:
        """Refuse CPUs unless they are allowed, then as usual."""
        adapter_for(self).check()
        super().setup_environment()

    def copy_from_rank0(self, root: nn.Module, values: Mapping[str, Tensor | None]) -> None:
        """Give a sharded module rank 0's ``initial_values`` from before sharding, one at a time; collective."""
        shards, device = self.shards(), self.root_device
        for name, p in root.named_parameters():
            value = values[name.replace(WRAPPER, "")]
            shards[id(p)].copy_from_rank0(value if self.is_global_zero else None, device)
        for name, buffer in root.named_buffers():
            if name.replace(WRAPPER, "") in values:
                x = buffer.detach().to(device).contiguous()
                broadcast(x, source=0)
                buffer.detach().copy_(x)

    def save_shards(self, directory: Path) -> Plain:
        """Trained parameters, the module's buffers and optimizer states, through ``torch.distributed.checkpoint``."""
        parameters, shards = self._trained()
        tensors: dict[str, Shard | Tensor] = self._weights(shards)
        plain: list[Plain] = []
        for k, optimizer in enumerate(self.optimizers):
            states, settings = state_tensors(optimizer, parameters, shards)
            tensors |= {f"{OPTIMIZER}{k}/{name}": x for name, x in states.items()}
            plain.append(settings)
        dcp.save(tensors, directory)
        return plain

    def load_shards(self, directory: Path, plain: Plain, *, optimizers: bool) -> None:
        """On any number of ranks, whatever the number that saved it."""
        settings = cast("list[Mapping[str, Any]]", plain)
        parameters, shards = self._trained()
        weights, saved = self._weights(shards), dcp.saved_tensors(directory)
        if other := sorted(weights.keys() ^ {name for name in saved if not name.startswith(OPTIMIZER)}):
            raise ValueError(f"{directory} was saved of another model or with other frozen parts: see {other[:3]}")
        dcp.load(weights, directory)
        for k, optimizer in enumerate(self.optimizers if optimizers else ()):
            prefix = f"{OPTIMIZER}{k}/"
            of_optimizer = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
            states = empty_state(of_optimizer, shards)
            dcp.load({prefix + name: x for name, x in states.items()}, directory)
            restore_state(optimizer, parameters, states, settings[k])

    def _trained(self) -> tuple[dict[str, nn.Parameter], dict[str, Shard]]:
        """Trained parameters and their shards, by the names that both generations share."""
        self.reshard()
        shards = self.shards()
        named = self.lightning_module.named_parameters()
        parameters = {name.replace(WRAPPER, ""): p for name, p in named if p.requires_grad}
        return parameters, {name: shards[id(p)] for name, p in parameters.items()}

    def _weights(self, shards: Mapping[str, Shard]) -> dict[str, Shard | Tensor]:
        """Everything but optimizer states that training changes; shares memory."""
        changing: dict[str, Shard | Tensor] = {**shards, **dict(self.lightning_module.named_buffers(recurse=False))}
        return {f"{WEIGHTS}{name}": x for name, x in changing.items()}


class RLFSDPStrategy(FullyShardedStrategy, FSDPStrategy):
    """First generation, whose successor is ``rl_fsdp2``. Arguments as of ``FullyShardedStrategy``."""

    _wrapped: FullyShardedDataParallel | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap layer by layer; Lightning's own method accepts no CPU as device."""
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        if self._wrapped is not None and self._wrapped.module is model:  # it stays wrapped between the stages of a run
            return self._wrapped
        values = initial_values(model)
        materialize(model)
        units = {id(unit) for unit in sharding_units(model)}
        self._wrapped = FullyShardedDataParallel(
            module=model,
            device_id=self.root_device,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or id(module) in units,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )
        _lazy_init(self._wrapped, self._wrapped)  # the first forward would do it, but weights are needed before
        self.copy_from_rank0(self._wrapped, values)
        return self._wrapped

    def reshard(self) -> None:
        """A forward without a backward leaves the parameters of the root gathered."""
        from torch.distributed.fsdp._runtime_utils import _reshard

        handle = self._wrapped._handle
        if handle is not None and handle.uses_sharded_strategy:  # a single rank shards nothing
            _reshard(self._wrapped, handle, free_unsharded_flat_param=True)

    def shards(self) -> dict[int, Shard]:
        """A parameter is a range of the flat parameter of its unit, of which every rank holds an equal range."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        handles = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(self._wrapped)]
        found = {}
        for handle in filter(None, handles):
            flat = handle.flat_param
            length = flat._sharded_size.numel()
            bounds = [length * r for r in range(handle.world_size + 1)]
            offsets = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
            starts = [start for (start, _), is_padding in offsets if not is_padding]
            for parameter, start, shape in zip(flat._params, starts, flat._shapes, strict=True):
                first = start - bounds[handle.rank]  # relative to this rank's range
                local = flat.detach()[max(0, first) : max(0, first + shape.numel())]
                found[id(parameter)] = Shard(local, bounds_within(bounds, start, shape.numel()), shape)
        return found


class RLFSDP2Strategy(FullyShardedStrategy, ModelParallelStrategy):
    """Second generation (``fully_shard``). Arguments as of ``FullyShardedStrategy``."""

    adapter_class = FSDP2Adapter

    def setup_environment(self) -> None:
        """All ranks have other data; none shares the arithmetic of a tensor with another."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard first: the optimizers are built for the shards."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.model, FSDPModule):  # it stays sharded between the stages of a run
            self.model = self.precision_plugin.convert_module(self.model)
            root, mesh = self.lightning_module, self.device_mesh["data_parallel"]
            values, name = initial_values(root), type(root).__name__
            materialize(root)
            for unit in (*sharding_units(root), root):
                fully_shard(unit, mesh=mesh)
            type(root).__name__ = name  # summaries and logs show the name of the algorithm
            self.copy_from_rank0(root, values)
            self.root._get_fsdp_state()._lazy_init()  # else the first module that runs becomes the root
        super().setup(trainer)

    @property
    def root(self) -> FSDPModule:
        """The sharded module."""
        return cast("FSDPModule", self.model)

    def reshard(self) -> None:
        """A forward without a backward leaves the parameters of the root gathered."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shards(self) -> dict[int, Shard]:
        """Rows are sharded as ``torch.chunk`` divides them: the last ranks may have fewer, or none."""
        found = {}
        for p in self.lightning_module.parameters():
            if isinstance(p, DTensor):
                rows = -(-p.shape[0] // p.device_mesh.size())
                bounds = even_bounds(p.numel(), rows * (p.numel() // max(1, p.shape[0])))
                found[id(p)] = Shard(p.to_local().detach().flatten(), bounds, p.shape)
        return found


StrategyRegistry.register("rl_fsdp", RLFSDPStrategy, description="FSDP for steps with many forwards")
StrategyRegistry.register("rl_fsdp2", RLFSDP2Strategy, description="FSDP2 for steps with many forwards")
