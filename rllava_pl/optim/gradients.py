"""Gradients that are copied to the host during backward and summed there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from rllava_pl.optim.transfer import Transfer, spans

_CHUNK = 2**18
"""Numbers added at a time, few enough for bf16 to be widened in cache."""
_HOOKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The hook of every parameter that has one; a new optimizer replaces it."""


class HostGradients:
    """The sums of the gradients of any number of backward passes, each sum exact in ``dtype``.

    A hook takes every gradient as soon as it is complete (once, also for a weight that is used twice), copies it to the
    host and sets ``p.grad`` to None. A parameter without a gradient has no sum.

    Args:
        transfer: Returns the transfer of a device.
        dtype: Of the sums.
    """

    def __init__(self, transfer: Callable[[torch.device], Transfer], dtype: torch.dtype) -> None:
        self._transfer = transfer
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}  # allocated once
        self._present: dict[Tensor, None] = {}  # in the order of arrival
        self._scale = torch.ones((), device="cpu")
        self._buffer = torch.empty(0, device="cpu")

    def watch(self, parameter: Parameter) -> None:
        """Take this parameter's gradients from now on, in place of an earlier optimizer."""
        owner = weakref.ref(self)  # parameters outlive their optimizer

        def take(p: Tensor) -> None:
            if (gradients := owner()) is not None:
                gradients.take(p)

        if parameter in _HOOKS:
            _HOOKS[parameter].remove()
        _HOOKS[parameter] = parameter.register_post_accumulate_grad_hook(take)

    def take(self, parameter: Tensor) -> None:
        """Add ``parameter.grad`` to its sum and set it to None."""
        if float(self._scale) != 1.0:
            raise RuntimeError("a backward pass after clipping: call step() or zero_grad() first")
        gradient, parameter.grad = parameter.grad, None
        if parameter not in self._sums:
            self._sums[parameter] = torch.empty(parameter.numel(), dtype=self._dtype, device="cpu")
        total, first = self._sums[parameter], parameter not in self._present
        self._present[parameter] = None

        def receive(span: slice, values: Tensor) -> None:
            for chunk in spans(len(values), _CHUNK):
                target = total[span][chunk]
                target.copy_(values[chunk]) if first else target.add_(values[chunk])

        self._transfer(parameter.device).to_host(gradient.reshape(-1), receive)

    def finish(self, parameters: Iterable[Tensor]) -> None:
        """Take gradients that were assigned to ``p.grad``, and wait for all copies."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.take(parameter)
        self._wait()

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients to a global L2 norm of at most ``max_norm``, as torch does; returns the norm before."""
        sums = [self._sums[p] for p in parameters if p in self._present]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in sums] or [torch.zeros((), device="cpu")]
        norm = self._scale * torch.linalg.vector_norm(torch.stack(norms))
        self._scale = self._scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)  # applied when the step reads the sums
        return norm

    def get(self, parameter: Tensor) -> Tensor | None:
        """The sum (n,), before clipping; None: there was no gradient."""
        return self._sums[parameter] if parameter in self._present else None

    def scaled(self, x: Tensor) -> Tensor:
        """A span of a sum, clipped, in fp32; the span itself if nothing changes, else valid until the next call."""
        if x.dtype == torch.float32 and float(self._scale) == 1.0:
            return x
        if len(self._buffer) < len(x):
            self._buffer = torch.empty(len(x), device="cpu")  # new memory would be cleared in every call
        out = self._buffer[: len(x)]
        return torch.mul(x, self._scale, out=out) if x.dtype == out.dtype else out.copy_(x).mul_(self._scale)

    def clear(self) -> None:
        """Drop all sums and pending copies."""
        self._wait()
        self._present.clear()
        self._scale = torch.ones((), device="cpu")

    def _wait(self) -> None:
        for device in {parameter.device for parameter in self._present}:
            self._transfer(device).wait()
