"""Gradients that leave the accelerator while backward runs, and are summed on the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from rllava_pl.optim.transfer import Lane, spans

_PIECE = 2**18
"""Numbers added at a time, so that a bf16 piece is widened in cache."""
_HOOKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The hook of every parameter that has one: a parameter's gradient can go to one place only."""


class HostGradients:
    """The sums of the gradients of any number of backward passes, each sum exact in ``dtype``.

    A hook takes every gradient the moment it is complete (a weight used twice gets both contributions first, and the
    hook is called once), sends it down the device's lane and leaves ``p.grad`` empty. A parameter that got no gradient
    has no sum.

    Args:
        lane: The lane of a device.
        dtype: Of the sums.
    """

    def __init__(self, lane: Callable[[torch.device], Lane], dtype: torch.dtype) -> None:
        self._lane = lane
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}  # memory is kept from step to step
        self._present: dict[Tensor, None] = {}  # in the order of arrival
        self._scale = torch.ones((), device="cpu")
        self._stretch = torch.empty(0, device="cpu")

    def watch(self, parameter: Parameter) -> None:
        """Take this parameter's gradients from now on, in place of whoever took them before."""
        if parameter in _HOOKS:
            _HOOKS[parameter].remove()
        _HOOKS[parameter] = _hook(parameter, self)

    def take(self, parameter: Tensor) -> None:
        """Add ``parameter.grad`` to its sum and empty it."""
        if float(self._scale) != 1.0:
            raise RuntimeError("a backward pass after clipping: take the step or call zero_grad() first")
        gradient, parameter.grad = parameter.grad, None
        if parameter not in self._sums:
            self._sums[parameter] = torch.empty(parameter.numel(), dtype=self._dtype, device="cpu")
        total, first = self._sums[parameter], parameter not in self._present
        self._present[parameter] = None

        def receive(span: slice, piece: Tensor) -> None:
            for part in spans(len(piece), _PIECE):
                target = total[span][part]
                target.copy_(piece[part]) if first else target.add_(piece[part])

        self._lane(parameter.device).collect(gradient.reshape(-1), receive)

    def settle(self, parameters: Iterable[Tensor]) -> None:
        """Take gradients that were put in place by hand, and wait for all that is under way."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.take(parameter)
        self._wait()

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients to a global L2 norm of at most ``max_norm``; the arithmetic of torch's clipping.

        Returns:
            The norm before, fp32, 0-dim.
        """
        sums = [self._sums[p] for p in parameters if p in self._present]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in sums] or [torch.zeros((), device="cpu")]
        norm = self._scale * torch.linalg.vector_norm(torch.stack(norms))
        self._scale = self._scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)  # applied where the step reads the sums
        return norm

    def get(self, parameter: Tensor) -> Tensor | None:
        """The sum (n,), before clipping; None: no gradient arrived."""
        return self._sums[parameter] if parameter in self._present else None

    def scaled(self, x: Tensor) -> Tensor:
        """A stretch of a sum, clipped, in fp32; the stretch itself where nothing changes, else valid until the next."""
        if x.dtype == torch.float32 and float(self._scale) == 1.0:
            return x
        if len(self._stretch) < len(x):
            self._stretch = torch.empty(len(x), device="cpu")  # new memory every time would be cleared every time
        held = self._stretch[: len(x)]
        return torch.mul(x, self._scale, out=held) if x.dtype == held.dtype else held.copy_(x).mul_(self._scale)

    def clear(self) -> None:
        """Forget all sums, and what is still on its way to them."""
        self._wait()
        self._present.clear()
        self._scale = torch.ones((), device="cpu")

    def _wait(self) -> None:
        for device in {parameter.device for parameter in self._present}:
            self._lane(device).wait()


def _hook(parameter: Parameter, gradients: HostGradients) -> RemovableHandle:
    """A hook that does not keep the sums alive: parameters outlive their optimizer."""
    owner = weakref.ref(gradients)

    def take(p: Tensor) -> None:
        if (alive := owner()) is not None:
            alive.take(p)

    return parameter.register_post_accumulate_grad_hook(take)
