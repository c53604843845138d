"""A backend for vLLM's weight-transfer API, for engines in the same process, in others, and on servers.

vLLM loads this module through the entry-point group ``vllm.general_plugins``, in the trainer's process, in the engine's
and in every worker's. A bucket of weights is a list of ``(name, tensor)`` where trainer and engine share a process, and
otherwise safetensors in base64, never a pickle.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

BACKEND = "rllava_pl"
"""Name of the backend in vLLM: ``--weight-transfer-config '{"backend": "rllava_pl"}'``."""
BUCKET_BYTES = 64 << 20


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]], limit_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors in lists of at most ``limit_bytes``; a larger tensor stands alone.

    The order stays: vLLM's loader keeps a layer in memory until it is complete.
    """
    bucket: list[tuple[str, Tensor]] = []
    filled = 0
    for name, tensor in named_tensors:
        if bucket and filled + tensor.nbytes > limit_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket


def to_text(bucket: Sequence[tuple[str, Tensor]]) -> str:
    """A bucket as base64 of safetensors, for JSON."""
    from safetensors.torch import save

    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in bucket}  # safetensors takes no shared memory
    return base64.b64encode(save(tensors)).decode("ascii")


def from_text(text: str) -> list[tuple[str, Tensor]]:
    """The inverse of ``to_text``."""
    from safetensors.torch import load

    return list(load(base64.b64decode(text, validate=True)).items())


def register() -> None:
    """Register the backend; vLLM calls this several times in one process."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import base, factory

    @dataclass
    class InitInfo(base.WeightTransferInitInfo):
        """No settings."""

    @dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):
        """One bucket."""

        weights: list[tuple[str, torch.Tensor]] | str

    class Receiver(base.WeightTransferEngine[InitInfo, UpdateInfo]):
        """The worker's side: loads buckets with vLLM's layer-by-layer loader."""

        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Nothing to open."""

        def start_weight_update(self) -> None:
            """Unpack the layers, as they are after loading from disk."""
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Load one bucket."""
            weights = update_info.weights
            try:
                self.model.load_weights(from_text(weights) if isinstance(weights, str) else weights)
            except BaseException:
                self.finish_weight_update()  # vLLM counts the update as ended; unpacked layers would break the next
                raise

        def finish_weight_update(self) -> None:
            """Pack the layers for their kernels."""
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Nothing to close."""

    if BACKEND not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
