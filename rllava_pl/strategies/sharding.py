"""Which parts of a module are sharded on their own, and checkpoints of shards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from rllava_pl.checkpoint.atomic import committed_directory, together
from rllava_pl.checkpoint.io import refuse_damaged
from rllava_pl.checkpoint.manifest import FACTS
from rllava_pl.distributed.shards import Piece, overwrite
from rllava_pl.models.lazy_weights import WAITING

LOOP_FILE = "loop.ckpt"
"""What Lightning stores beside weights and optimizer states; written by rank 0, read by all."""


def units(root: nn.Module) -> list[nn.Module]:
    """Modules that are gathered one at a time, inner ones first; what is left belongs to the root.

    They are the layers of every transformers model, and the children of the root that are called as a whole: a frozen
    reference, a value head. A trained policy is read in parts (hidden states, then the head), so its embeddings and its
    head stay with the root, whose forward does everything.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]
    whole = [child for child in root.children() if next(child.parameters(), None) is not None]
    return layers + [child for child in whole if isinstance(child, nn.Linear) or not _trained(child)]


def make_room(root: nn.Module) -> None:
    """Give empty parameters a place on the host, shared ones the same place.

    Nothing is written there, so the system hands out no memory; buffers have their values.
    """
    places: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                place = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = places.setdefault(parameter, place)


def values_of(root: nn.Module) -> dict[str, Tensor | None]:
    """Parameters and persistent buffers by name, in the same order on all ranks; None where this rank has no value.

    A parameter that waits for its value (see ``VLM.load``) is represented by it.
    """
    tensors = {name: x for name, x in root.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    found = {name: getattr(x, WAITING, x) for name, x in tensors.items()}
    return {name: None if x.is_meta else x.detach() for name, x in found.items()}


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class CheckpointDirectory(ParallelStrategy):
    """Checkpoints as directories that appear whole: shards of every rank, and what Lightning stores beside them.

    As many ranks must resume as saved. ``ExportHF`` writes the whole model.
    """

    @abstractmethod
    def save_shards(self, directory: Path) -> None:
        """Write this rank's part of trained weights and optimizer states; collective."""

    @abstractmethod
    def load_shards(self, directory: Path, *, optimizers: bool) -> None:
        """Take back what ``save_shards`` wrote, optimizer states only if wanted; collective.

        Raises:
            ValueError: It was saved by another strategy, of another model, or on another number of ranks.
        """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights do not pass through Lightning's part of the checkpoint."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing, for the same reason."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | PathLike[str], storage_options: object | None = None
    ) -> None:
        """Write a directory that gets its name when the files of all ranks are on disk; see ``durable.py``."""
        with committed_directory(Path(self.broadcast(str(filepath))), checkpoint.get(FACTS)) as draft:
            self.save_shards(draft)
            if self.is_global_zero:
                loop = {key: x for key, x in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
                torch.save(loop, draft / LOOP_FILE)

    def load_checkpoint(self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """Fill this rank's shards; returns the rest. Files are read with ``weights_only``, whatever is asked for.

        Raises:
            ValueError: It is no such directory, or not one of this strategy and number of ranks.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not (path / LOOP_FILE).is_file():
            raise ValueError(f"{path} is no checkpoint of {type(self).__name__}: it holds no {LOOP_FILE}")
        with together():
            if self.is_global_zero:
                refuse_damaged(path)
        loop: dict[str, Any] = torch.load(path / LOOP_FILE, map_location="cpu", weights_only=True)
        self.load_shards(path, optimizers=self.lightning_module.trainer.state.fn == TrainerFn.FITTING)
        return loop | {"state_dict": {}}


class LocalShards(CheckpointDirectory):
    """For both kinds of FSDP: a file a rank, with plain tensors.

    The formats of ``torch.distributed.checkpoint`` keep their index as a pickle, which would have to be trusted.
    """

    @abstractmethod
    def reshard(self) -> None:
        """Have this rank hold nothing but its parts."""

    @abstractmethod
    def pieces(self) -> dict[int, Piece]:
        """What this rank holds of every parameter, by its id; it holds nothing but its parts."""

    def fill(self, root: nn.Module, values: Mapping[str, Tensor | None]) -> None:
        """Give parameters and persistent buffers rank 0's values, one tensor at a time; collective.

        Args:
            root: As it is wrapped.
            values: From ``values_of`` before that; only those of rank 0 count.
        """
        pieces, device = self.pieces(), self.root_device
        for name, p in root.named_parameters():
            value = values[name.replace("_fsdp_wrapped_module.", "")]
            pieces[id(p)].fill(value if self.is_global_zero else None, device)
        for name, buffer in root.named_buffers():
            if name.replace("_fsdp_wrapped_module.", "") in values:
                overwrite(buffer, device)

    def save_shards(self, directory: Path) -> None:
        """Local parts of trained parameters and of optimizer states."""
        self.reshard()
        optimizers = [tree_map_only(DTensor, _local, optimizer.state_dict()) for optimizer in self.optimizers]
        torch.save({"weights": self._local_weights(), "optimizers": optimizers}, self._file(directory))

    def load_shards(self, directory: Path, *, optimizers: bool) -> None:
        """Copy into the parameters as they are cut now, which must be the same."""
        file = self._file(directory)
        if not file.is_file():
            raise ValueError(f"{directory} holds no {file.name}: it resumes on as many ranks as saved it")
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights = self._local_weights()
        if other := sorted(weights.keys() ^ saved["weights"].keys()):
            raise ValueError(f"{directory} was saved of another model or with other parts frozen: see {other[:3]}")
        for name, weight in weights.items():
            weight.copy_(saved["weights"][name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True) if optimizers else ():
            _load_state(optimizer, state)

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self.global_rank:05d}-of-{self.world_size:05d}.ckpt"

    def _local_weights(self) -> dict[str, Tensor]:
        """This rank's part of what training changes, by name; shares memory."""
        root = self.lightning_module
        trained = {name: _local(p) for name, p in root.named_parameters() if p.requires_grad}
        return trained | dict(root.named_buffers(recurse=False))


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def _load_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state of local tensors, each laid out as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: _like(parameters[index], x) if isinstance(x, Tensor) else x for name, x in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or x.shape != parameter.to_local().shape:  # such as the count of steps
        return x
    layout = (parameter.device_mesh, parameter.placements)
    x = x.to(parameter.device)
    return DTensor.from_local(x, *layout, run_check=False, shape=parameter.shape, stride=parameter.stride())
