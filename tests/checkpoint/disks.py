"""Checkpoints and full disks for the tests."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rllava_pl.checkpoint import manifest

FACTS = {"rollouts": 3, "updates": 6, "config_sha256": "c0ffee", "saved_at_ns": 5}


def checkpoint(value: float = 1.0) -> dict[str, object]:
    """What Lightning would save: about 140 kB."""
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": {"weight": torch.full((300, 100), value), "noise": torch.rand(5000, generator=generator)},
        "loops": {"name": "fit", "batches": [1, 2]},
        manifest.FACTS: FACTS,
    }


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
