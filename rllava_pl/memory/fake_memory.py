"""Peak memory of a computation that is not carried out.

Weights, activations and gradients are fake tensors: they have a shape, a dtype and a storage that is counted, but no
memory. Token ids, masks, image grids and positions are real, because models read their values to decide on shapes. So
the package's own forward and backward run unchanged, images included, for a model of any size on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL_LIMIT = 1 << 20
"""Factory functions return fake tensors for floating-point results above this number of bytes."""
_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put}


class FakeMemory(TorchDispatchMode):
    """Runs operators on fake tensors and counts the bytes that are alive; use it as ``with memory: ...``.

    Attributes:
        fake: The mode in which fake tensors are made.
        peaks: Largest number of live bytes in each interval, without and with the gradients in ``.grad``; ``mark``
            begins an interval.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.peaks: list[tuple[int, int]] = [(0, 0)]
        self._sizes: dict[int, int] = {}
        """Bytes of every living storage by its address; 0: not counted."""
        self._gradients: set[int] = set()
        self._live_bytes = 0
        self._gradient_bytes = 0

    def ignore(self, model: torch.nn.Module) -> None:
        """Leave weights and buffers out of the count: where they are kept depends on the strategy."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._track(tensor, count=False)

    def mark(self) -> None:
        """Begin an interval of ``peaks``."""
        self.peaks.append((self._live_bytes, self._live_bytes + self._gradient_bytes))

    @contextmanager
    def separate_gradients(self, model: torch.nn.Module) -> Iterator[None]:
        """Count gradients separately as soon as they are complete; they are dropped at the end."""
        trained = [p for p in model.parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._count_as_gradient) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None

    def _count_as_gradient(self, parameter: Tensor) -> None:
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self._live_bytes -= self._sizes[key]
            self._gradient_bytes += self._sizes[key]

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run one operator, as a fake one if any of its tensors is fake, and count its results."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            if func.overloadpacket in _INDEXING:  # the number of rows that a mask selects must be known
                args = (args[0], [part for index in args[1] for part in _as_positions(index)], *args[2:])
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if not tensors and isinstance(out, Tensor) and out.is_floating_point() and out.nbytes > REAL_LIMIT:
                with self.fake:
                    out = torch.empty_strided(out.size(), out.stride(), dtype=out.dtype)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return out

    def _track(self, tensor: Tensor, *, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if count else 0
        weakref.finalize(storage, self._free, key).atexit = False
        self._live_bytes += self._sizes[key]
        alone, with_gradients = self.peaks[-1]
        live = self._live_bytes
        self.peaks[-1] = (max(alone, live), max(with_gradients, live + self._gradient_bytes))

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.remove(key)
            self._gradient_bytes -= size
        else:
            self._live_bytes -= size


def _as_positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions it selects, one tensor an axis; any other index unchanged.

    A mask that depends on pixels or weights is itself fake; it is taken to select everything.
    """
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    if isinstance(index, FakeTensor):
        index = torch.ones(index.shape, dtype=torch.bool)
    return list(index.nonzero().unbind(1))
