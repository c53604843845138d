"""What all sharded strategies share: which modules are gathered together, and checkpoints that are directories.

The state of an optimizer is stored as named shards: ``PARAMETER/FIELD``, e.g. ``policy.model.lm_head.weight/exp_avg``.
A tensor with the layout of its parameter, such as a moment, is sharded like it; others, such as the count of steps, are
equal on all ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rllava_pl.checkpoint.atomic import committed_directory, raise_on_all_ranks
from rllava_pl.checkpoint.codec import Plain
from rllava_pl.checkpoint.io import refuse_damaged
from rllava_pl.checkpoint.manifest import FACTS
from rllava_pl.distributed.collectives import gather_objects
from rllava_pl.distributed.shards import Shard
from rllava_pl.models.lazy_weights import LAZY_VALUE
from rllava_pl.models.trainable import hf_weights
from rllava_pl.strategies.adapter import StrategyAdapter
from rllava_pl.strategies.ddp import RLStrategyMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOP_FILE = "loop.ckpt"
"""Name of the file for everything but tensors of weights and optimizers; written by rank 0, read by all."""
OPTIMIZERS = "sharded_optimizers"
"""Key in that file: settings of the optimizers, as ``save_shards`` returned them."""


def sharding_units(root: nn.Module) -> list[nn.Module]:
    """Modules that are gathered one at a time, inner ones first; other parameters belong to the root.

    They are the layers of every transformers model, and the children of the root that are called as a whole: a frozen
    reference, a value head. Of a trained policy the hidden states and the head are computed separately, so its
    embeddings and its head stay with the root.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]
    children = [child for child in root.children() if next(child.parameters(), None) is not None]
    trained = {id(child) for child in children if any(p.requires_grad for p in child.parameters())}
    return layers + [child for child in children if isinstance(child, nn.Linear) or id(child) not in trained]


def materialize(root: nn.Module) -> None:
    """Replace meta parameters by uninitialised ones on the host; shared parameters stay shared.

    The values are not written, so the system reserves no memory for them. Buffers are not on the meta device.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = replaced.setdefault(parameter, empty)


def initial_values(root: nn.Module) -> dict[str, Tensor | None]:
    """Parameters and persistent buffers by name, in the same order on all ranks; None where this rank has no value.

    A lazy parameter (see ``models.lazy_weights``) is represented by its value in the file.
    """
    tensors = {name: x for name, x in root.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    values = {name: getattr(x, LAZY_VALUE, x) for name, x in tensors.items()}
    return {name: None if x.is_meta else x.detach() for name, x in values.items()}


class ShardedAdapter(StrategyAdapter):
    """Shards are exchanged in every micro-batch, so that no rank ever holds all gradients and none can retry alone."""

    strategy: ShardedStrategy
    can_retry = False

    def check(self) -> None:
        """Refuse CPUs unless the option allows them."""
        if self.strategy.accelerator.name() == "cpu" and not self.strategy.allow_cpu:  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self.strategy).__name__} saves GPU memory and the accelerator is cpu; use `rl_ddp`, or "
                "allow_cpu: true to try it out"
            )

    def full_weights(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Gathered from the shards, one tensor at a time."""
        self.strategy.reshard()
        shards, device = self.strategy.shards(), self.strategy.root_device

        def full_tensor(x: Tensor) -> Tensor:
            return shards[id(x)].full_tensor(device) if id(x) in shards else x.detach()

        return hf_weights(model, full_tensor)


class ShardedStrategy(RLStrategyMixin, ParallelStrategy):
    """Checkpoints are directories: the shards of every rank, and a file for what Lightning stores beside them.

    ``ExportHF`` writes the whole model.
    """

    adapter_class: ClassVar[type[StrategyAdapter]] = ShardedAdapter
    allow_cpu: bool

    @abstractmethod
    def shards(self) -> dict[int, Shard]:
        """The shard of every sharded parameter, by the parameter's id; call ``reshard`` first."""

    @abstractmethod
    def reshard(self) -> None:
        """Free parameters that a forward without a backward has left gathered."""

    @abstractmethod
    def save_shards(self, directory: Path) -> Plain:
        """Write this rank's shards of trained weights and optimizer states; collective.

        Returns plain data to store with them; that of rank 0 is kept.
        """

    @abstractmethod
    def load_shards(self, directory: Path, plain: Plain, *, optimizers: bool) -> None:
        """Restore what ``save_shards`` wrote, optimizer states only if wanted; collective.

        Raises a ValueError if another strategy saved it or it belongs to another model.
        """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights are not part of Lightning's checkpoint dictionary."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty, for the same reason."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | PathLike[str], storage_options: object | None = None
    ) -> None:
        """Write a directory, which appears when the files of all ranks are on disk; see ``checkpoint.atomic``."""
        with committed_directory(Path(self.broadcast(str(filepath))), checkpoint.get(FACTS)) as temporary:
            plain = self.save_shards(temporary)
            if self.is_global_zero:
                loop = {key: x for key, x in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
                torch.save(loop | {OPTIMIZERS: plain}, temporary / LOOP_FILE)

    def load_checkpoint(self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """Fill this rank's shards; returns everything else. Files are read as tensors and plain data only."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if not (path / LOOP_FILE).is_file():
            raise ValueError(f"{path} is no checkpoint of {type(self).__name__}: it has no {LOOP_FILE}")
        with raise_on_all_ranks():
            if self.is_global_zero:
                refuse_damaged(path)
        loop: dict[str, Any] = torch.load(path / LOOP_FILE, map_location="cpu", weights_only=True)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        self.load_shards(path, loop.pop(OPTIMIZERS, None), optimizers=fitting)
        return loop | {"state_dict": {}}


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def state_tensors(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], shards: Mapping[str, Shard]
) -> tuple[dict[str, Shard | Tensor], dict[str, Any]]:
    """The state of the optimizer of these parameters, sharing memory, and the plain data beside it; collective."""
    tensors: dict[str, Shard | Tensor] = {}
    values: dict[str, object] = {}
    for name, parameter in parameters.items():
        for field, x in optimizer.state.get(parameter, {}).items():
            if not isinstance(x, Tensor):
                values[f"{name}/{field}"] = x
            elif local_tensor(x).shape == local_tensor(parameter).shape:
                tensors[f"{name}/{field}"] = shards[name].with_local(local_tensor(x))
            else:
                tensors[f"{name}/{field}"] = x
    values = {name: x for part in gather_objects(values) for name, x in part.items()}
    return tensors, {"param_groups": optimizer.state_dict()["param_groups"], "values": values}


def empty_state(saved: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Shard | Tensor]:
    """Uninitialised tensors, sharded as the parameters are now, to load a state into.

    Args:
        saved: Tensors of the right dtypes, in full and flattened where they are sharded; without storage.
        shards: Of the parameters, by name.
    """

    def empty(x: Tensor, shard: Shard) -> Shard | Tensor:
        if x.shape == (shard.bounds[-1],):
            return shard.with_local(torch.empty_like(shard.local, dtype=x.dtype))
        return torch.empty_like(x, device="cpu")

    return {name: empty(x, shards[name.rsplit("/", 1)[0]]) for name, x in saved.items()}


def restore_state(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Shard | Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Load what ``state_tensors`` returned into the optimizer of the same parameters, however they are sharded now."""
    positions = {id(p): k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, object]] = {}
    for key, x in {**tensors, **plain["values"]}.items():
        name, field = key.rsplit("/", 1)
        value = _with_layout_of(parameters[name], x.local) if isinstance(x, Shard) else x
        state.setdefault(positions[id(parameters[name])], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def _with_layout_of(parameter: Tensor, local: Tensor) -> Tensor:
    local = local.view(local_tensor(parameter).shape)
    if not isinstance(parameter, DTensor):
        return local
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
