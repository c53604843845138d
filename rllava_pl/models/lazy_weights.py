"""Weights that stay in their file until they are sharded, so that the rank which reads them needs no copy of the model.

safetensors maps files into memory, so weights in the dtype of their file need no memory of the process. Most
checkpoints are in bfloat16 and training is in float32: converted at once, they would take four bytes a parameter on the
rank that reads. So they stay in bfloat16, and each is converted when it is sharded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAZY_VALUE = "lazy_value"
"""Attribute of an empty parameter: its value, in another dtype."""
NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
"""16-bit dtypes by their names in safetensors."""


def narrow_dtype(path: str, revision: str) -> torch.dtype | None:
    """The 16-bit dtype of all weights of a checkpoint; None for mixed or other dtypes and other formats."""
    from transformers.utils import cached_file

    try:
        config = cached_file(path, "config.json", revision=revision)
    except OSError:
        return None
    found = set[str]()
    for file in Path(config).parent.glob("*.safetensors") if config else ():
        with file.open("rb") as stream:  # eight bytes of length, then JSON
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return NARROW.get(found.pop()) if len(found) == 1 else None


def with_lazy_weights(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Replace parameters of other dtypes by empty ones of ``dtype`` that carry their values; tied ones stay tied.

    Persistent buffers are converted.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                module._parameters[name] = replaced.setdefault(parameter, _empty(parameter, dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = dtype
    return model


def _empty(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    empty = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), parameter.requires_grad)
    setattr(empty, LAZY_VALUE, parameter.detach())
    return empty
