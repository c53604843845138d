"""Fewer bits a number: representable values stay, all others are right on average."""

from __future__ import annotations

import torch

from rllava_pl.functional import rounding
from rllava_pl.functional.rounding import BLOCK, TABLE_SIZE, noise_table, sample_noise, unit_noise_table

STEP = 2.0**-7  # of bf16 between 1 and 2


def test_noise_table_holds_every_value_equally_often():
    counts = torch.bincount(noise_table(16)[:TABLE_SIZE].long(), minlength=2**16)
    assert (counts == TABLE_SIZE / 2**16).all()
    assert torch.equal(noise_table(16)[:TABLE_SIZE], noise_table(16)[TABLE_SIZE:])
    assert sorted(set(noise_table(19)[:TABLE_SIZE].tolist())) == list(range(0, 2**19, 2))
    assert unit_noise_table().min() == 0.0 and unit_noise_table().max() < 1.0


def test_noise_is_a_function_of_counters_and_position():
    noise = sample_noise(noise_table(16), 0, TABLE_SIZE, "weight", 3)
    assert torch.equal(noise, sample_noise(noise_table(16), 0, TABLE_SIZE, "weight", 3))
    assert not torch.equal(noise, sample_noise(noise_table(16), 0, TABLE_SIZE, "weight", 4))
    assert not torch.equal(noise, sample_noise(noise_table(16), TABLE_SIZE, TABLE_SIZE, "weight", 3))
    halves = [sample_noise(noise_table(16), start, TABLE_SIZE // 2, "weight", 3) for start in (0, TABLE_SIZE // 2)]
    assert torch.equal(noise, torch.cat(halves))  # however the tensor is split


def test_bf16_is_a_neighbour_and_exact_on_average():
    for part in (0.0, 0.25, 0.7, 1.0):
        for sign in (1.0, -1.0):
            x = sign * (1.5 + part * STEP)
            rounded = rounding.on_bfloat16_grid(torch.full((TABLE_SIZE,), x), noise_table(16)[:TABLE_SIZE]).double()
            assert set(rounded.tolist()) <= {sign * 1.5, sign * (1.5 + STEP)}
            assert abs(rounded.mean() - x) < STEP / 2**15


def test_bf16_numbers_are_unchanged():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:3] = torch.tensor([0.0, -0.0, 1e-38])
    back = rounding.on_bfloat16_grid(x.float(), sample_noise(noise_table(16), 0, len(x), 1)).bfloat16()
    assert torch.equal(back.view(torch.int16), x.view(torch.int16))


def test_int8_is_within_a_step_and_exact_on_average():
    """In a block whose largest is 127 a step is 1: 41.75 becomes 42 three times of four."""
    x = torch.zeros(TABLE_SIZE).view(-1, BLOCK)
    x[:, 0], x[:, 1], x[:, 2] = 127.0, 41.75, -0.25
    back = rounding.from_int8(*rounding.to_int8(x.view(-1), unit_noise_table()[:TABLE_SIZE])).view(-1, BLOCK)
    assert (back[:, 0] == 127.0).all() and (back[:, 3:] == 0.0).all()
    assert set(back[:, 1].tolist()) == {41.0, 42.0} and abs(back[:, 1].mean() - 41.75) < 0.05  # 1,024 draws
    assert set(back[:, 2].tolist()) == {0.0, -1.0} and abs(back[:, 2].mean() + 0.25) < 0.05


def test_largest_number_of_a_block_keeps_its_sign():
    """Rounding errors may put it above 127, and the largest noise on top; 128 would wrap around."""
    x = torch.zeros(1000, BLOCK)
    x[:, 0] = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    x[:, 1] = -x[:, 0]
    for noise in (float(unit_noise_table().max()), 0.0):
        codes, _ = rounding.to_int8(x.view(-1), torch.full((x.numel(),), noise))
        assert (codes.view(-1, BLOCK)[:, 0] >= 126).all()
        assert (codes.view(-1, BLOCK)[:, 1] <= -126).all()


def test_float8_is_relative_and_exact_on_average():
    """Between 2**-5 and 2**-4 of the largest a step is 2**-9; 3.25 steps above 2**-5 become 3 or 4."""
    x = torch.zeros(TABLE_SIZE).view(-1, BLOCK)
    x[:, 0], x[:, 1] = 1.0, 2.0**-5 + 3.25 * 2.0**-9
    back = rounding.from_float8(*rounding.to_float8(x.view(-1), noise_table(19)[:TABLE_SIZE])).view(-1, BLOCK)
    steps = (back[:, 1] - 2.0**-5) * 2**9
    assert (back[:, 0] == 1.0).all()
    assert set(steps.tolist()) == {3.0, 4.0} and abs(steps.mean() - 3.25) < 0.05
    x = torch.rand(TABLE_SIZE, generator=torch.Generator().manual_seed(0)).add_(2.0**-8)
    back = rounding.from_float8(*rounding.to_float8(7.0 * x, sample_noise(noise_table(19), 0, TABLE_SIZE, 1)))
    assert ((back / (7.0 * x) - 1.0).abs() <= 1 / 16).all()


def test_small_second_moment_beside_a_large_one_is_not_0():
    codes, scales = rounding.to_float8(torch.tensor([4.0, 1e-12, 0.0]), torch.zeros(BLOCK, dtype=torch.int32))
    back = rounding.from_float8(codes, scales)
    assert back[0] == 4.0
    assert back[1] == back[2] == 4.0 * 2.0**-16 * (1 + 1 / 16)


def test_blocks_of_zeros_and_incomplete_blocks_are_restored():
    for encode, decode, noise in (
        (rounding.to_int8, rounding.from_int8, unit_noise_table()),
        (rounding.to_float8, rounding.from_float8, noise_table(19)),
    ):
        x = torch.zeros(BLOCK + 3)
        x[BLOCK:] = torch.tensor([1.0, 0.5, 0.25])
        codes, scales = encode(x, noise[: rounding.padded(len(x))])
        assert len(codes) == 2 * BLOCK and scales.tolist() == [0.0, 1.0]
        back = decode(codes, scales)
        assert (back[:BLOCK] == 0.0).all()
        torch.testing.assert_close(back[BLOCK : BLOCK + 3], x[BLOCK:], atol=1 / 127, rtol=0)
