"""Sharded tensors in safetensors files, through ``torch.distributed.checkpoint``.

Every rank writes its own shards; any number of ranks can read them. A parameter is stored flattened, as its shards are
ranges of the flattened parameter. The files hold tensors only and reading them runs no code of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from rllava_pl.distributed.collectives import gather_objects, rank
from rllava_pl.distributed.shards import Shard

Tensors: TypeAlias = Mapping[str, "Shard | Tensor"]
"""By name; a plain tensor is equal on all ranks that have it."""

FILE_BYTES = 1 << 29
"""A file is serialised in memory before it is written, so a rank divides its shards into files of at most this size."""


class _Range(Tensor):
    """Range of a longer vector; has the methods that ``torch.distributed.checkpoint`` calls on a sharded tensor."""

    start: int
    numel_total: int

    @classmethod
    def of(cls, shard: Shard) -> Tensor:
        x = shard.local.detach().as_subclass(cls)
        x.start, x.numel_total = shard.bounds[rank()], shard.bounds[-1]
        return x

    def size(self) -> torch.Size:  # type: ignore[override]
        return torch.Size([self.numel_total])

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        local = self.as_subclass(Tensor)
        return [ChunkStorageMetadata(torch.Size([self.start]), local.size())] if len(local) else []

    def __create_write_items__(self, name: str, x: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(Tensor))
        chunks = ((x.offsets, TensorWriteData(x, properties, self.size())) for x in self.__create_chunk_list__())
        return [WriteItem(MetadataIndex(name, at), WriteItemType.SHARD, tensor_data=data) for at, data in chunks]


def save(tensors: Tensors, directory: Path) -> None:
    """Write the shards of all ranks into an existing directory; collective.

    Raises:
        OSError: On every rank, if writing failed on any of them.
    """
    own = {name: (x.local if isinstance(x, Shard) else x).nbytes for name, x in tensors.items()}
    sizes: dict[str, int] = {}
    for part in gather_objects(own):
        sizes |= {name: max(size, sizes.get(name, 0)) for name, size in part.items()}
    file_of, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        file_of[name], filled = number, filled + size
    writer = HuggingFaceStorageWriter(str(directory), file_of, save_distributed=True)
    with _os_errors(directory):
        save_state_dict(_ranges(tensors), storage_writer=writer)


def load(tensors: Tensors, directory: Path) -> None:
    """Overwrite tensors, sharded over any number of ranks, with what ``save`` wrote under their names; collective.

    Raises:
        OSError: On every rank, if reading failed on any of them.
    """
    with _os_errors(directory):
        load_state_dict(_ranges(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))


def saved_tensors(directory: Path) -> dict[str, Tensor]:
    """Names, sizes and dtypes in a directory, as tensors without storage (meta device); shards are flattened."""
    metadata = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(x.size, dtype=x.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, x in metadata.items()
    }


def _ranges(tensors: Tensors) -> dict[str, Tensor]:
    return {name: _Range.of(x) if isinstance(x, Shard) else x.detach() for name, x in tensors.items()}


@contextmanager
def _os_errors(directory: Path) -> Iterator[None]:
    """``CheckpointException`` is a ``BaseException``, which callers would not catch."""
    try:
        yield
    except CheckpointException as error:
        number, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{directory}: rank {number}: {type(cause).__name__}: {cause}") from error
