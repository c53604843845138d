"""Randomness as a function of counters: equal counters give equal numbers, on every device and in any order of calls.

A run can therefore be resumed bit by bit without the state of a random-number generator.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def seed_from(*counters: int | str) -> int:
    """Hash counters to a seed: ``seed_from(run_seed, "sampling", step, prompt_uid, sample)``.

    Every counter is hashed with its type and its length, so ``("a", "b")`` differs from ``("ab",)``, and ``1`` from
    ``"1"``. Returns 0 <= seed < 2**63, the same on every machine. A counter that is neither int nor str raises
    TypeError (True and False included: say 0 or 1).

    >>> seed_from(0, "sampling", 3) == seed_from(0, "sampling", 3), seed_from("a", "b") == seed_from("ab")
    (True, False)
    """
    digest = blake2b(digest_size=8)
    for counter in counters:
        if type(counter) not in (int, str):
            raise TypeError(f"counter {counter!r} is a {type(counter).__name__}; seeds are made of int and str")
        payload = str(counter).encode("utf-8", "surrogatepass")
        digest.update(f"{type(counter).__name__}:{len(payload)}:".encode())
        digest.update(payload)
    return int.from_bytes(digest.digest(), "big") >> 1


def uniforms(seeds_N: Tensor, counter: int) -> Tensor:
    """One uniform number a seed: number ``counter`` of the SplitMix64 stream that starts at the seed.

    Each entry depends on its own seed and the counter alone, not on its neighbours, and is the same on every device:
    fp64 (N,), multiples of 2**-53 in [0, 1). Seeds must be int64, e.g. of :func:`seed_from`; the counter is e.g. the
    index of the token to draw.

    >>> uniforms(torch.tensor([1234567]), 0)  # 6457827717110365317 / 2**64
    tensor([0.3501], dtype=torch.float64)
    """
    if seeds_N.dtype != torch.int64:
        raise ValueError(f"seeds_N has dtype {seeds_N.dtype}; it must be torch.int64")
    z = seeds_N + _signed((counter + 1) * _GOLDEN_GAMMA)
    z = (z ^ _shifted(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX_2)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def permutation(seed: int, n: int) -> list[int]:
    """A random order of ``range(n)``, n >= 0, as a function of the seed.

    >>> sorted(permutation(17, 5))
    [0, 1, 2, 3, 4]
    """
    if n < 0:
        raise ValueError(f"n is {n}; a permutation has 0 or more items")
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``: torch multiplies and adds modulo 2**64 then."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
