"""Stochastic rounding of fp32 to bf16, and to 8 bits in blocks.

A value between two representable ones becomes either, with the probability that makes its expectation exact. At RL
learning rates bf16 weights would not change otherwise: an update is a hundredth of the distance to the next value.

Noise comes from a fixed table that is read from an offset, so rounding is a function of counters, like all randomness
here, and adding it costs one pass over a buffer that stays in cache.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rllava_pl.functional.seeds import seed_from

TABLE_SIZE = 2**18
"""Entries of a noise table; every so many numbers of a tensor have another offset into it."""
BLOCK = 256
"""Numbers that share a scale."""
_FRACTION_BITS_LOST = 19  # of fp32's 23, where 4 are kept
_LOWEST = (127 << 4) - 255  # fp32's exponent and 4 fraction bits, read as an integer, 255 below that of 1.0
_TINY = 2.0**-100
"""Smallest divisor: 127 divided by it is finite, so that zeros stay zeros."""


@cache
def noise_table(bits: int) -> Tensor:
    """A fixed shuffle of evenly spaced integers below ``2**bits``, int32 (2 * TABLE_SIZE,): all entries, twice.

    Every value is equally frequent (beyond 18 bits every 2nd or 4th value), so the mean over all offsets is exact.
    """
    generator = torch.Generator().manual_seed(seed_from("rounding deck"))
    table = torch.randperm(TABLE_SIZE, generator=generator, device="cpu").to(torch.int32)
    shift = bits - TABLE_SIZE.bit_length() + 1
    table = table << shift if shift > 0 else table >> -shift
    return torch.cat([table, table])


@cache
def unit_noise_table() -> Tensor:
    """The table as fp32 in [0, 1)."""
    return noise_table(16) * 2.0**-16


def sample_noise(table: Tensor, start: int, count: int, *counters: int | str) -> Tensor:
    """Noise for ``count`` numbers of a tensor from position ``start`` on: a function of counters and positions only.

    The numbers must not cross a multiple of ``TABLE_SIZE``.
    """
    page, inside = divmod(start, TABLE_SIZE)
    first = seed_from(*counters, page) % TABLE_SIZE + inside
    return table[first : first + count]


def on_bfloat16_grid(x: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 to one of the two bf16 neighbours: noise is added to the 16 bits that are dropped, and may carry.

    ``x`` is contiguous and finite, the noise int32 (n,) of ``noise_table(16)``. Returns bf16 numbers, as fp32, with
    mean ``x`` over the noise; bf16 numbers are unchanged.

    >>> x = torch.full((4,), 1.0 + 2**-8)  # half-way: bf16 has 1 and 1 + 2**-7 there
    >>> on_bfloat16_grid(x, torch.tensor([0, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)).tolist()
    [1.0, 1.0, 1.0078125, 1.0078125]
    """
    return (x.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)


def to_int8(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Signed numbers as 8-bit integers: in a block of 256 the largest magnitude is 127, steps are even.

    ``x`` is fp32 (n,), finite, the noise fp32 (n padded to whole blocks,) of ``unit_noise_table()``. Returns codes int8
    (blocks * 256,) and scales fp32 (blocks,); ``from_int8`` has mean ``x`` over the noise.

    >>> codes, scales = to_int8(torch.tensor([-254.0, 1.0, 0.0]), torch.tensor([0.9, 0.4, 0.9] + 253 * [0.0]))
    >>> codes[:3].tolist(), scales.tolist()  # a step is 2: 1 is half a step, and 0.5 + 0.4 < 1
    ([-127, 0, 0], [254.0])
    """
    blocks = _blocks(x)
    scales = torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1).neg_())
    steps = blocks * (127.0 / scales.clamp(min=_TINY))[:, None]
    codes = steps.view(-1).add_(noise).floor_().clamp_(max=127)  # 127 in rounded arithmetic may be a little more
    return codes.to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of ``to_int8``: code * scale / 127, fp32 (blocks * 256,)."""
    return (codes.view(-1, BLOCK) * (scales / 127.0)[:, None]).view(-1)


def to_float8(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers at least 0 as floats of 4 exponent and 4 fraction bits, relative to the largest of their block.

    Steps are 3 to 6 % of the value over a range of 2**16; even steps would round small values to 0. Still smaller ones
    are raised to the lowest code: a second moment of 0 would turn a small gradient into a huge update.

    ``x`` is fp32 (n,), finite, >= 0, the noise int32 (n padded to whole blocks,) of ``noise_table(19)``. Returns codes
    uint8 (blocks * 256,) and scales fp32 (blocks,); ``from_float8`` has mean ``x`` over the noise, within the range.

    >>> codes, scales = to_float8(torch.tensor([8.0, 4.0, 0.0]), torch.zeros(256, dtype=torch.int32))
    >>> codes[:3].tolist(), scales.tolist()  # half of the largest is one exponent, so 16 codes, lower
    ([255, 239, 0], [8.0])
    """
    blocks = _blocks(x)
    scales = blocks.amax(dim=1)
    parts = blocks * scales.clamp(min=_TINY).reciprocal_()[:, None]
    codes = parts.view(-1).view(torch.int32).add_(noise).bitwise_right_shift_(_FRACTION_BITS_LOST)
    return codes.sub_(_LOWEST).clamp_(0, 255).to(torch.uint8), scales


def from_float8(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of ``to_float8``, fp32 (blocks * 256,); blocks of scale 0 are 0."""
    parts = codes.to(torch.int32).add_(_LOWEST).bitwise_left_shift_(_FRACTION_BITS_LOST).view(torch.float32)
    return parts.view(-1, BLOCK).mul_(scales[:, None]).view(-1)


def padded(n: int) -> int:
    """``n`` rounded up to whole blocks."""
    return n + -n % BLOCK


def _blocks(x: Tensor) -> Tensor:
    """``x`` as rows of ``BLOCK``, the last padded with zeros."""
    missing = padded(len(x)) - len(x)
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)
