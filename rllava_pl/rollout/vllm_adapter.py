"""LoRA adapters as files that vLLM reads, so that an update sends them and not the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.lora.request import LoRARequest

    from rllava_pl.models.policy import Policy

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``max_lora_rank``."""


def adapter_options(policy: Policy) -> dict[str, object]:
    """Arguments of ``vllm.LLM`` for this policy's adapters.

    Raises:
        ValueError: There are none, they lie outside the language model, or their rank is too large for vLLM.
    """
    model = policy.model
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if not layers:
        raise ValueError("lora: adapter needs a policy with LoRA adapters, and this one has none; use lora: merge")
    decoder = {id(module) for module in model.get_decoder().modules()}
    if outside := [name for name, module in layers.items() if id(module) not in decoder]:
        raise ValueError(
            f"lora: adapter would leave out {outside[0]} (and {len(outside) - 1} more): vLLM ignores adapters outside "
            "the language model; use lora: merge, which covers every layer"
        )
    rank = max(next(iter(module.r.values())) for module in layers.values())  # type: ignore[union-attr, operator]
    if rank > RANKS[-1]:
        raise ValueError(f"lora: adapter: rank {rank} is above vLLM's largest, {RANKS[-1]}; use lora: merge")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= rank)}


def base_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Stream ``(name, tensor)`` of a model as if it had no adapters, named as in the ``state_dict`` without them."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor.detach()


class AdapterFile:
    """The policy's adapter in a temporary directory, in memory where the system has such a place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._directory = TemporaryDirectory(prefix="rllava_pl-adapter-", dir=shared)
        self.path = Path(self._directory.name)

    def write(self) -> LoRARequest:
        """The adapter as it is now, and the request that makes vLLM read it again."""
        self.model.save_pretrained(self.path)
        return self.request(load_inplace=True)

    def request(self, *, load_inplace: bool = False) -> LoRARequest:
        """The adapter, as an argument of a request."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", 1, str(self.path), load_inplace=load_inplace)

    def close(self) -> None:
        """Remove the files."""
        self._directory.cleanup()
