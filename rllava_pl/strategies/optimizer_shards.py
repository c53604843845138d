"""The state of an optimizer over sharded parameters as named shards, and back.

A tensor of the state is named ``PARAMETER/FIELD``, e.g. ``policy.model.lm_head.weight/exp_avg``. One that has the
layout of its parameter, such as a moment, is sharded like it; others, such as the count of steps, are equal on all
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rllava_pl.distributed.collectives import gather_objects
from rllava_pl.distributed.shards import Shard


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def state_tensors(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], shards: Mapping[str, Shard]
) -> tuple[dict[str, Shard | Tensor], dict[str, Any]]:
    """The state of an optimizer as it is, sharing memory, and the plain data beside it; collective.

    Args:
        optimizer: Of these parameters.
        parameters: By name.
        shards: Of the same parameters, by the same names.
    """
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
    empty: dict[str, Shard | Tensor] = {}
    for name, x in saved.items():
        shard = shards[name.rsplit("/", 1)[0]]
        if x.shape == (shard.bounds[-1],):
            empty[name] = shard.with_local(torch.empty_like(shard.local, dtype=x.dtype))
        else:
            empty[name] = torch.empty_like(x, device="cpu")
    return empty


def restore_state(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Shard | Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Load what ``state_tensors`` returned into the optimizer of the same parameters, however they are sharded now."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[id(p)]: k for k, p in enumerate(order)}
    state: dict[int, dict[str, object]] = {}
    for key, x in {**tensors, **plain["values"]}.items():
        name, field = key.rsplit("/", 1)
        value = _with_layout_of(parameters[name], x.local) if isinstance(x, Shard) else x
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def _with_layout_of(parameter: Tensor, local: Tensor) -> Tensor:
    local = local.view(local_tensor(parameter).shape)
    if not isinstance(parameter, DTensor):
        return local
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
