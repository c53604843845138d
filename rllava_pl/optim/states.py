"""Optimizer states in host memory between steps; they are read and written as fp32, one span at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from rllava_pl.functional import rounding

Seed = tuple[int | str, ...]
"""Counters that determine the noise of stochastic rounding."""


class StateTensor(ABC):
    """A flat tensor of n numbers in some precision.

    Attributes:
        tensors: Content of a checkpoint, by the suffix of its name.
    """

    tensors: dict[str, Tensor]

    @abstractmethod
    def read(self, span: slice) -> Tensor:
        """A span in fp32, to be changed in place and then written back."""

    @abstractmethod
    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Store the new values of a span that was read."""


class Float32(StateTensor):
    """fp32, updated in place."""

    def __init__(self, x: Tensor) -> None:
        self.tensors = {"": x}

    @classmethod
    def zeros(cls, n: int) -> Float32:
        """All zeros."""
        return cls(torch.zeros(n, device="cpu"))

    def read(self, span: slice) -> Tensor:
        """The memory itself."""
        return self.tensors[""][span]

    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Nothing to do: ``read`` returns the memory itself."""


class BFloat16(StateTensor):
    """bf16 with stochastic rounding; rounded to nearest, a second moment could not decay by 0.1 % a step."""

    def __init__(self, n: int) -> None:
        self.tensors = {"": torch.zeros(n, dtype=torch.bfloat16, device="cpu")}

    def read(self, span: slice) -> Tensor:
        """A copy in fp32."""
        return self.tensors[""][span].float()

    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Round stochastically."""
        self.tensors[""][span] = rounding.on_bfloat16_grid(
            x, rounding.sample_noise(rounding.noise_table(16), span.start, len(x), *seed)
        )


class BlockQuantized(StateTensor):
    """8-bit codes, and an fp32 scale per block of 256."""

    def __init__(self, n: int, codes: torch.dtype) -> None:
        padded = rounding.padded(n)
        self.tensors = {
            "": torch.zeros(padded, dtype=codes, device="cpu"),
            "_scale": torch.zeros(padded // rounding.BLOCK, device="cpu"),
        }

    def _parts(self, span: slice) -> tuple[slice, slice]:
        """Where the codes and the scales of a span are; a span begins with a block."""
        codes = slice(span.start, span.start + rounding.padded(span.stop - span.start))
        return codes, slice(codes.start // rounding.BLOCK, codes.stop // rounding.BLOCK)

    def _decoded(self, span: slice, decode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        codes, scales = self._parts(span)
        return decode(self.tensors[""][codes], self.tensors["_scale"][scales])[: span.stop - span.start]

    def _store(self, span: slice, coded: tuple[Tensor, Tensor]) -> None:
        codes, scales = self._parts(span)
        self.tensors[""][codes], self.tensors["_scale"][scales] = coded


class Int8(BlockQuantized):
    """For numbers of both signs: the first moment."""

    def __init__(self, n: int) -> None:
        super().__init__(n, torch.int8)

    def read(self, span: slice) -> Tensor:
        """Decode."""
        return self._decoded(span, rounding.from_int8)

    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Encode with new scales."""
        noise = rounding.sample_noise(rounding.unit_noise_table(), span.start, rounding.padded(len(x)), *seed)
        self._store(span, rounding.to_int8(x, noise))


class Float8(BlockQuantized):
    """For numbers that are at least 0: the second moment."""

    def __init__(self, n: int) -> None:
        super().__init__(n, torch.uint8)

    def read(self, span: slice) -> Tensor:
        """Decode."""
        return self._decoded(span, rounding.from_float8)

    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Encode with new scales."""
        noise = rounding.sample_noise(rounding.noise_table(19), span.start, rounding.padded(len(x)), *seed)
        self._store(span, rounding.to_float8(x, noise))
