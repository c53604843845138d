"""Randomness as a function of counters."""

from __future__ import annotations

from hashlib import blake2b

import pytest
import torch

from rllava_pl.functional.seeds import permutation, seed_from, uniforms

SAMPLES = 2**16
MASK = 2**64 - 1
# Frozen: a change would silently give every resumed run other samples and another order of data.
KNOWN_SEED = 82839207622557812
KNOWN_PERMUTATION = [7, 0, 1, 5, 6, 4, 3, 2]


def slow_uniform(seed: int, counter: int) -> float:
    """SplitMix64 on Python integers, one step of its state at a time."""
    state = seed & MASK
    for _ in range(counter + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def test_known_seeds_never_change():
    assert seed_from() == int.from_bytes(blake2b(digest_size=8).digest(), "big") >> 1
    encoded = b"int:2:42str:8:samplingint:2:-1str:2:\xc3\xa9"
    expected = int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big") >> 1
    assert seed_from(42, "sampling", -1, "é") == expected == KNOWN_SEED


def test_seed_depends_on_value_type_place_and_bounds_of_counters():
    keys = [(), ("",), ("", ""), ("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), (1,), ("1",), (1, 1), (11,), (0,)]
    keys += [(-1,), (2**63,), (2**64,), ("int:1:1",), ("1int:1:1",), ("1", 1)]
    assert len({seed_from(*key) for key in keys}) == len(keys)


def test_seeds_fill_63_bits():
    seeds = torch.tensor([seed_from(0, "row", index) for index in range(4096)])
    assert (seeds >= 0).all() and len(seeds.unique()) == 4096
    bits = torch.stack([(seeds >> bit) & 1 for bit in range(63)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 5 * 0.5 / 4096**0.5


def test_text_with_surrogates_is_hashed():
    assert seed_from("\udcff") != seed_from("\udcfe")


@pytest.mark.parametrize("counter", [True, 1.0, None, b"a"])
def test_counter_of_another_type_is_refused(counter):
    message = f"is a {type(counter).__name__}; seeds are made of int and str$"
    with pytest.raises(TypeError, match=message):
        seed_from(0, counter)


def test_numbers_are_those_of_the_published_generator():
    # first outputs of SplitMix64 from the seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    actual = [uniforms(torch.tensor([1234567]), counter).item() for counter in range(4)]
    assert actual == [(output >> 11) / 2**53 for output in published]


def test_numbers_equal_a_slow_loop():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), *(seed_from(index) for index in range(200))]
    for counter in range(8):
        actual = uniforms(torch.tensor(seeds), counter)
        assert actual.dtype == torch.float64
        assert actual.tolist() == [slow_uniform(seed, counter) for seed in seeds]


def test_number_does_not_depend_on_its_batch():
    seeds = torch.tensor([seed_from(index) for index in range(32)])
    whole = uniforms(seeds, 5)
    assert torch.equal(uniforms(seeds[7:8], 5), whole[7:8])
    assert torch.equal(uniforms(seeds.flip(0), 5).flip(0), whole)
    assert uniforms(seeds[:0], 5).shape == (0,)


@pytest.mark.parametrize("neighbours", ["seeds", "counters", "hashes"])
def test_numbers_are_uniform_and_unrelated_to_their_neighbours(neighbours):
    if neighbours == "seeds":
        u = uniforms(torch.arange(SAMPLES), 0)
    elif neighbours == "counters":
        u = torch.cat([uniforms(torch.tensor([17]), counter) for counter in range(SAMPLES // 8)])
    else:
        u = uniforms(torch.tensor([seed_from(index) for index in range(SAMPLES // 8)]), 3)
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    # mean 1/2 and variance 1/12, each within five standard errors; the variance's is sqrt(1/180 / n)
    assert abs(u.mean().item() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var().item() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    bins = torch.histc(u.float(), 64, 0, 1).double()
    chi_square = ((bins - n / 64) ** 2 / (n / 64)).sum().item()
    assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5
    for lag in (1, 2, 7, 64):
        assert abs(correlation(u[:-lag], u[lag:])) < 5 / n**0.5


def test_streams_of_neighbouring_seeds_are_unrelated():
    streams = torch.stack([uniforms(torch.arange(8), counter) for counter in range(4096)], 1)
    off_diagonal = torch.corrcoef(streams) - torch.eye(8, dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / 4096**0.5


def test_seeds_must_be_int64():
    with pytest.raises(ValueError, match=r"^seeds_N has dtype torch\.int32; it must be torch\.int64$"):
        uniforms(torch.tensor([1], dtype=torch.int32), 0)


def test_permutation_depends_on_the_seed_only():
    state = torch.get_rng_state()
    assert permutation(17, 8) == KNOWN_PERMUTATION
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(permutation(seed_from("epoch", 3), 1000)) == list(range(1000))
    assert permutation(1, 1000) != permutation(2, 1000)
    assert permutation(5, 0) == []


def test_every_place_of_a_permutation_is_equally_likely():
    first = torch.tensor([permutation(seed_from(index), 6)[0] for index in range(3000)])
    counts = torch.bincount(first, minlength=6).double()
    assert ((counts - 500) ** 2 / 500).sum() < 5 + 5 * 10**0.5


def test_negative_number_of_items_is_refused():
    with pytest.raises(ValueError, match=r"^n is -1; a permutation has 0 or more items$"):
        permutation(0, -1)
