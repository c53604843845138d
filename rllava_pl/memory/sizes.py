"""Sizes of a model from its config, and of an optimizer from one of its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from rllava_pl.memory.budget import ModelSize, OptimizerCost
from rllava_pl.memory.fake_policy import layers_of, meta_model
from rllava_pl.memory.settings import PlannedModel

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
PROBE_ELEMENTS = 1 << 16


@lru_cache(maxsize=32)
def model_size(planned: PlannedModel) -> ModelSize:
    """Sizes of the model with its adapters and frozen parts; it is built without memory, tied weights count once."""
    model = meta_model(planned)
    parameters, text = list(model.parameters()), model.config.get_text_config()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    total, weight_bytes = sum(p.numel() for p in parameters), parameters[0].element_size()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelSize(
        parameters=total,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest=max(p.numel() for p in parameters),
        layer=max(layers),
        root=total - sum(layers),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        weight_bytes=weight_bytes,
        kv_bytes=2 * text.num_hidden_layers * heads * head_dim * weight_bytes,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
    )


def optimizer_cost(make: MakeOptimizer, dtype: torch.dtype, size: ModelSize, *, on_gpu: bool) -> OptimizerCost:
    """States that an optimizer holds after one step on a small parameter of the same dtype, and its temporaries.

    On a GPU torch's optimizers update all parameters at once (``foreach``) and hold temporaries of the same size,
    unless they are fused; on a CPU they update one parameter after the other.
    """
    probe = nn.Parameter(torch.zeros(PROBE_ELEMENTS, dtype=dtype))
    optimizer = make([probe])
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    states = [x for x in tree_leaves(optimizer.state_dict()["state"]) if isinstance(x, Tensor) and x.numel() > 1]
    fused = bool(optimizer.defaults.get("fused"))
    together = on_gpu and optimizer.defaults.get("foreach") is not False
    scratch = size.trained if together else min(2 * size.largest, 2 * size.trained)
    moment_bytes = sum(x.nbytes for x in states) / PROBE_ELEMENTS
    return OptimizerCost(moment_bytes, 0.0 if fused else scratch * float(probe.element_size()))
