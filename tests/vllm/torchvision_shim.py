"""Makes a CUDA build of torchvision import beside a CPU build of torch; for test environments alone.

vLLM's vision models ask transformers for a video processor, which asks for torchvision. Where only its CUDA build is to
be had, ``import torchvision`` fails, because its operators cannot be loaded. This file declares the two operators that
are missed; nothing here computes with them. It belongs into ``site-packages`` with a ``.pth`` file that imports it,
since vLLM starts further processes. It costs nothing until torchvision is imported, and leaves a matching build
alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Steps in once, at the first import of torchvision."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torchvision")
        if spec is not None and spec.origin:
            declare_operators(Path(spec.origin).parent)
        return spec


def declare_operators(folder: Path) -> None:
    """Declare what the build in ``folder`` would have brought, if it cannot be loaded."""
    import torch

    try:
        torch.ops.load_library(next(folder.glob("_C.*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._rllava_pl_torchvision = library  # declarations live as long as their library


sys.meta_path.insert(0, TorchvisionFinder())
