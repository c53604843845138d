"""Optimizer states in host memory between steps; they are read and written as fp32, one span at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
        noise = rounding.sample_noise(rounding.noise_table(16), span.start, len(x), *seed)
        self.tensors[""][span] = rounding.on_bfloat16_grid(x, noise)


class BlockQuantized(StateTensor):
    """8-bit codes, and an fp32 scale per block of 256.

    Args:
        n: Numbers.
        signed: Integers for numbers of both signs, the first moment; otherwise floats for numbers that are at least 0,
            the second moment.
    """

    def __init__(self, n: int, *, signed: bool) -> None:
        padded = rounding.padded(n)
        self.signed = signed
        self.tensors = {
            "": torch.zeros(padded, dtype=torch.int8 if signed else torch.uint8, device="cpu"),
            "_scale": torch.zeros(padded // rounding.BLOCK, device="cpu"),
        }

    def read(self, span: slice) -> Tensor:
        """Decode."""
        codes, scales = self._parts(span)
        decode = rounding.from_int8 if self.signed else rounding.from_float8
        return decode(self.tensors[""][codes], self.tensors["_scale"][scales])[: span.stop - span.start]

    def write(self, span: slice, x: Tensor, seed: Seed) -> None:
        """Encode with new scales."""
        codes, scales = self._parts(span)
        table = rounding.unit_noise_table() if self.signed else rounding.noise_table(19)
        noise = rounding.sample_noise(table, span.start, codes.stop - codes.start, *seed)
        encode = rounding.to_int8 if self.signed else rounding.to_float8
        self.tensors[""][codes], self.tensors["_scale"][scales] = encode(x, noise)

    def _parts(self, span: slice) -> tuple[slice, slice]:
        """Where the codes and the scales of a span are; a span begins with a block."""
        codes = slice(span.start, span.start + rounding.padded(span.stop - span.start))
        return codes, slice(codes.start // rounding.BLOCK, codes.stop // rounding.BLOCK)
