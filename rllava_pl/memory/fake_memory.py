"""Memory of a computation that is never carried out.

Weights, activations and gradients are fake tensors: shape, dtype and a storage that is counted, but no bytes behind it.
Token ids, masks, image grids and positions are real, because models read their values to decide on shapes. So the
package's own forward runs as it is, images included, for a model of any size on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL_LIMIT = 1 << 20
"""Tensors of floating-point numbers made from nothing are fake above this many bytes."""
Moment = tuple[str, str, int]
"""Pass (``score``, ``forward``, ``backward``), what is running (``text``, ``vision``, ``rest``), and which of them."""
_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put}


class FakeMemory(TorchDispatchMode):
    """Counts live bytes while fake tensors are computed with; ``with memory: ...`` around what is to be counted.

    Attributes:
        peaks: Largest number of live bytes at each moment, without and with the gradients that are kept in ``.grad``.
        moment: What is going on; the caller names it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.moment: Moment = ("", "rest", 0)
        self.peaks: dict[Moment, tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._kept: set[int] = set()
        self._live = 0
        self._gradients = 0

    def ignore(self, model: torch.nn.Module) -> None:
        """Leave weights and buffers out of the count: where they live is the strategy's affair."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._watch(tensor, count=False)

    @contextmanager
    def gradients_kept(self, model: torch.nn.Module) -> Iterator[None]:
        """Count gradients apart from the moment they are complete; they are dropped at the end."""
        trained = [p for p in model.parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._keep) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None

    def _keep(self, parameter: Tensor) -> None:
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._kept:
            self._kept.add(key)
            self._live -= self._sizes[key]
            self._gradients += self._sizes[key]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - any operator
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it gives
        """Run one operator, fake if any of its tensors is, and count what it made."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            out = self._run_fake(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
            if not tensors and isinstance(out, Tensor) and out.is_floating_point() and out.nbytes > REAL_LIMIT:
                with self.fake:
                    out = torch.empty_strided(out.size(), out.stride(), dtype=out.dtype)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _run_fake(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if func.overloadpacket in _INDEXING:  # how many rows a mask selects must be known
            args = (args[0], [part for index in args[1] for part in _as_positions(index)], *args[2:])
        with self.fake:
            return func(*args, **kwargs)

    def _watch(self, tensor: Tensor, *, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._watched:
            return
        self._watched[key] = weakref.ref(storage, self._forgetter(key))
        if not count:
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        without, with_gradients = self.peaks.get(self.moment, (0, 0))
        self.peaks[self.moment] = (max(without, self._live), max(with_gradients, self._live + self._gradients))

    def _forgetter(self, key: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._watched[key]
            size = self._sizes.pop(key, 0)
            if key in self._kept:
                self._kept.remove(key)
                self._gradients -= size
            else:
                self._live -= size

        return forget


def _as_positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions it selects, one tensor an axis; anything else as it is.

    A mask that depends on pixels or weights is fake itself: it is taken to select everything.
    """
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    if isinstance(index, FakeTensor):
        index = torch.ones(index.shape, dtype=torch.bool)
    return list(index.nonzero().unbind(1))
