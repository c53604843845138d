"""Shards in safetensors files: several files, other layouts, full disks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rllava_pl.checkpoint import dcp
from rllava_pl.distributed.shards import Shard
from tests.checkpoint.disks import files_up_to

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process, no process group


def shard(x: torch.Tensor) -> Shard:
    return Shard(x.flatten(), (0, x.numel()), x.shape)


def tensors() -> dict[str, Shard | torch.Tensor]:
    """Two shards that are views of one tensor, one in bfloat16, and a plain scalar."""
    base = torch.arange(12.0)
    wide, narrow = shard(base[:6].view(2, 3)), shard(base[6:].view(3, 2))
    half = shard(torch.tensor([0.1, 0.2], dtype=torch.bfloat16))
    return {"wide": wide, "narrow": narrow, "half": half, "step": torch.tensor(3.0)}


@pytest.mark.parametrize(("file_bytes", "files"), [(1 << 29, 1), (24, 3)])
def test_shards_come_back_whatever_the_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, files: int
) -> None:
    monkeypatch.setattr(dcp, "FILE_BYTES", file_bytes)
    saved, loaded = tensors(), tensors()
    for x in loaded.values():
        (x.local if isinstance(x, Shard) else x).zero_()
    dcp.save(saved, tmp_path)
    assert len(list(tmp_path.iterdir())) == files
    dcp.load(loaded, tmp_path)
    assert torch.equal(loaded["step"], saved["step"])
    for name in ("wide", "narrow", "half"):
        assert torch.equal(loaded[name].local, saved[name].local), name


def test_names_sizes_and_dtypes_are_read_without_values(tmp_path: Path) -> None:
    dcp.save(tensors(), tmp_path)
    found = dcp.saved_tensors(tmp_path)
    assert {name: (tuple(x.shape), x.dtype) for name, x in found.items()} == {
        "wide": ((6,), torch.float32),
        "narrow": ((6,), torch.float32),
        "half": ((2,), torch.bfloat16),
        "step": ((), torch.float32),
    }


def test_full_disk_is_an_os_error_that_names_the_directory(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(OSError, match=f"{tmp_path}: rank 0: .*File too large"):
        dcp.save(tensors(), tmp_path)


def test_damaged_file_is_an_os_error(tmp_path: Path) -> None:
    dcp.save(tensors(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises((OSError, ValueError)):
        dcp.load(tensors(), tmp_path)


def test_shape_of_another_model_is_refused(tmp_path: Path) -> None:
    dcp.save(tensors(), tmp_path)
    with pytest.raises(OSError, match=r"Size mismatch between saved torch.Size\(\[6\]\) and current: .* for wide"):
        dcp.load({"wide": shard(torch.zeros(4))}, tmp_path)
