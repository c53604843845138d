"""Sizes of a model from its config, of an optimizer from a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from rllava_pl.memory.budget import OptimizerCost, Shapes
from rllava_pl.memory.fake_policy import layers_of, phantom_model
from rllava_pl.memory.settings import Source
from rllava_pl.models.architectures import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

PROBE_ELEMENTS = 1 << 16


@lru_cache(maxsize=32)
def shapes_of(source: Source) -> Shapes:
    """Sizes of the full model, which is built without memory (``meta``); frozen parts and adapters as in the run."""
    return measured(phantom_model(source, config_of(source.path, source.revision)))


def measured(model: PreTrainedModel) -> Shapes:
    """Sizes of a model; ``model.parameters()`` has tied weights once."""
    parameters, text = list(model.parameters()), model.config.get_text_config()
    layers = [_count(layer.parameters()) for kind in layers_of(model).values() for layer in kind]
    total, weight_bytes = _count(parameters), parameters[0].element_size()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shapes(
        parameters=total,
        trained=_count(p for p in parameters if p.requires_grad),
        largest=max(p.numel() for p in parameters),
        layer=max(layers),
        root=total - sum(layers),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        weight_bytes=weight_bytes,
        kv_bytes=2 * text.num_hidden_layers * heads * head_dim * weight_bytes,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
    )


def optimizer_cost(make: MakeOptimizer, dtype: torch.dtype, shapes: Shapes, *, on_gpu: bool) -> OptimizerCost:
    """What an optimizer keeps, counted after one step of it on a small parameter of the same dtype.

    On a GPU torch's optimizers update all parameters at once (``foreach``) and hold temporaries as large as they are,
    unless they are fused; on a CPU they go one by one.
    """
    probe = nn.Parameter(torch.zeros(PROBE_ELEMENTS, dtype=dtype))
    optimizer = make([probe])
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    kept = sum(x.nbytes for x in _tensors(optimizer.state_dict()["state"].values()) if x.numel() > 1)
    fused = bool(optimizer.defaults.get("fused"))
    together = on_gpu and optimizer.defaults.get("foreach") is not False
    scratch = shapes.trained if together else min(2 * shapes.largest, 2 * shapes.trained)
    return OptimizerCost(kept / PROBE_ELEMENTS, 0.0 if fused else scratch * float(probe.element_size()))


def _tensors(states: Iterable[Any]) -> Iterable[Tensor]:
    leaves = [x.tensors() if callable(getattr(x, "tensors", None)) else x for x in states]
    return [x for x in tree_leaves(leaves) if isinstance(x, Tensor)]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
