"""Masked statistics and the reduction of losses."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from rllava_pl.functional.reduce import ReduceMode, loss_denominator, masked_mean, masked_whiten, reduce_loss
from tests.functional.cases import assert_near, cases, generator, masks, matrix

MODES: tuple[ReduceMode, ...] = get_args(ReduceMode)
DTYPES = [torch.float32, torch.float64]
NON_FINITE = torch.tensor([math.nan, math.inf, -math.inf])


def selected(x: Tensor, mask: Tensor) -> list[list[float]]:
    """The selected values of every row."""
    pairs = zip(x.double().tolist(), mask.tolist(), strict=True)
    return [[value for value, keep in zip(row, kept, strict=True) if keep] for row, kept in pairs]


def slow_mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def slow_whiten(x: Tensor, mask: Tensor) -> Tensor:
    kept = [value for row in selected(x, mask) for value in row]
    mean = slow_mean(kept)
    var = sum((value - mean) ** 2 for value in kept) / (len(kept) - 1) if len(kept) > 1 else 0.0
    rows = zip(x.double().tolist(), mask.tolist(), strict=True)
    white = [
        [(value - mean) / math.sqrt(var + 1e-8) if keep else 0.0 for value, keep in zip(*row, strict=True)]
        for row in rows
    ]
    return matrix(white, x)


def slow_loss(x: Tensor, mask: Tensor, mode: str, max_tokens: int) -> float:
    rows = selected(x, mask)
    tokens = sum(len(row) for row in rows)
    used = sum(len(row) > 0 for row in rows)
    if mode == "sequence-mean-token-mean":
        return sum(slow_mean(row) for row in rows) / max(used, 1)
    divisor = {"token-mean": tokens, "sequence-mean-token-sum": used, "constant": len(rows) * max_tokens}[mode]
    return sum(sum(row) for row in rows) / max(divisor, 1)


@pytest.mark.parametrize(
    ("mode", "max_tokens", "expected"),
    # (5 * 1 + 2 * 10) / 7 tokens; (1 + 10) / 2 rows; (5 + 20) / 2 rows; 25 / (2 rows * 5)
    [
        ("token-mean", None, 25 / 7),
        ("sequence-mean-token-mean", None, 5.5),
        ("sequence-mean-token-sum", None, 12.5),
        ("constant", 5, 2.5),
    ],
)
def test_two_rows_of_unequal_length_have_their_losses(mode, max_tokens, expected):
    loss = torch.tensor([[1.0, 1, 1, 1, 1], [10, 10, -7, 8, 9]])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert reduce_loss(loss, mask, mode, max_tokens=max_tokens).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "max_tokens", "expected"),
    # 6 / 2 tokens; 3 / 1 row; 6 / 1 row; 6 / (2 rows * 4): only "constant" counts the empty row
    [
        ("token-mean", None, 3.0),
        ("sequence-mean-token-mean", None, 3.0),
        ("sequence-mean-token-sum", None, 6.0),
        ("constant", 4, 0.75),
    ],
)
def test_row_without_tokens_counts_in_constant_mode_only(mode, max_tokens, expected):
    loss = torch.tensor([[2.0, 4, 9], [7, 7, 7]])
    mask = torch.tensor([[True, True, False], [False] * 3])
    assert reduce_loss(loss, mask, mode, max_tokens=max_tokens).item() == expected


def test_three_values_are_whitened():
    # mean 2, unbiased variance 1
    white = masked_whiten(torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(white, torch.tensor([[-1.0, 0, 1, 0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mean_equals_a_slow_loop(dtype):
    for x, _, _, mask in cases(dtype, seed=1):
        rows = selected(x, mask)
        columns = selected(x.T, mask.T)
        everything = torch.tensor(slow_mean([value for row in rows for value in row]), dtype=torch.float64)
        assert_near(masked_mean(x, mask), everything, dtype=dtype)
        by_row = torch.tensor([slow_mean(row) for row in rows], dtype=torch.float64)
        assert_near(masked_mean(x, mask, dim=1), by_row, dtype=dtype)
        by_column = torch.tensor([slow_mean(column) for column in columns], dtype=torch.float64)
        assert_near(masked_mean(x, mask, 0), by_column, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_whiten_equals_a_slow_loop(dtype):
    for x, _, _, mask in cases(dtype, seed=2):
        assert_near(masked_whiten(x, mask), slow_whiten(x, mask), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_reduce_loss_equals_a_slow_loop(mode, dtype):
    for x, _, _, mask in cases(dtype, seed=3):
        expected = torch.tensor(slow_loss(x, mask, mode, 11), dtype=torch.float64)
        assert_near(reduce_loss(x, mask, mode, max_tokens=11), expected, dtype=dtype)


def test_denominator_is_an_fp32_scalar_counting_tokens_rows_or_budget():
    for _, _, _, mask in cases(torch.float32, seed=4):
        rows = [sum(row) for row in mask.tolist()]
        used = sum(row > 0 for row in rows)
        expected = [sum(rows), used, used, 13 * len(rows)]
        counts = [loss_denominator(mask, mode, max_tokens=13) for mode in MODES]
        assert [count.item() for count in counts] == expected
        assert all(count.shape == () and count.dtype == torch.float32 for count in counts)


def test_micro_batch_averages_of_four_rows_would_depend_on_the_split():
    # rows of 5, 2, 1, 8 tokens with losses 1, 10, -4, 2: (5 + 20 - 4 + 16) / 16 tokens
    lengths, losses = torch.tensor([5, 2, 1, 8]), torch.tensor([1.0, 10, -4, 2])
    mask = torch.arange(8) < lengths[:, None]
    loss = losses[:, None].expand(4, 8)
    assert reduce_loss(loss, mask, "token-mean").item() == 2.3125
    denominator = loss_denominator(mask, "token-mean")
    for size in (1, 2, 3, 4):
        parts = zip(loss.split(size), mask.split(size), strict=True)
        total = sum(reduce_loss(*part, "token-mean", denominator=denominator).item() for part in parts)
        assert total == pytest.approx(2.3125)


@pytest.mark.parametrize("mode", MODES)
def test_any_split_over_micro_batches_and_ranks_gives_the_same_gradient(mode):
    rng = generator(5)
    scale = torch.randn(6, generator=rng).requires_grad_()
    features, mask = torch.randn(12, 6, generator=rng), masks((12, 6), rng)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, scale)[0]

    whole = gradient(reduce_loss((features * scale).exp(), mask, mode, max_tokens=6))
    for world_size in (1, 2):
        ranks = torch.randperm(12, generator=rng).chunk(world_size)
        denominator = sum(loss_denominator(mask[rows], mode, max_tokens=6) for rows in ranks)
        for size in (1, 2, 5, 12):
            # what a data-parallel strategy leaves: the average over ranks of the accumulated gradients
            averaged = torch.zeros(6)
            for rows in ranks:
                for part in rows.split(size):
                    loss = reduce_loss((features[part] * scale).exp(), mask[part], mode, denominator=denominator)
                    averaged += gradient(world_size * loss) / world_size
            torch.testing.assert_close(averaged, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", NON_FINITE)
def test_masked_positions_influence_neither_value_nor_gradient(bad):
    clean = torch.tensor([[1.0, -2, 0, 4], [3, 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    functions = [masked_mean, lambda x, m: masked_mean(x, m, 1).sum(), lambda x, m: masked_whiten(x, m).pow(3).sum()]
    functions += [lambda x, m, mode=mode: reduce_loss(x, m, mode, max_tokens=4) for mode in MODES]
    for function in functions:
        results = []
        for x in (clean, torch.where(mask, clean, bad)):
            leaf = x.clone().requires_grad_()
            value = function(leaf, mask)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        assert (results[1][1][~mask] == 0).all()
    assert (masked_whiten(torch.where(mask, clean, bad), mask)[~mask] == 0).all()


def test_gradients_are_those_of_finite_differences():
    rng = generator(6)
    x = torch.randn(4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    mask = masks((4, 5), rng)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask), x)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask, 1), x)
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask), x)
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda x, mode=mode: reduce_loss(x, mask, mode, max_tokens=5), x)


def test_sample_order_and_padding_columns_have_no_influence():
    for x, _, _, mask in list(cases(torch.float64, seed=7))[::10]:
        order = torch.randperm(len(x), generator=generator(0))
        wide = torch.cat([x, torch.full_like(x, 1e6)], 1)
        wide_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
        assert_near(masked_whiten(x[order], mask[order]), masked_whiten(x, mask)[order], dtype=x.dtype)
        assert_near(masked_whiten(wide, wide_mask)[:, : x.shape[1]], masked_whiten(x, mask), dtype=x.dtype)
        for mode in MODES:
            expected = reduce_loss(x, mask, mode, max_tokens=9)
            assert_near(reduce_loss(x[order], mask[order], mode, max_tokens=9), expected, dtype=x.dtype)
            assert_near(reduce_loss(wide, wide_mask, mode, max_tokens=9), expected, dtype=x.dtype)


@pytest.mark.parametrize("mode", MODES)
def test_batch_without_tokens_gives_zero_and_stays_connected(mode):
    x = torch.randn(3, 4, requires_grad=True)
    empty = torch.zeros(3, 4, dtype=torch.bool)
    loss = reduce_loss(x, empty, mode, max_tokens=4)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None and (x.grad == 0).all()
    assert reduce_loss(x, empty, mode, denominator=0).item() == 0
    assert masked_mean(x, empty).item() == 0
    assert (masked_whiten(x, empty) == 0).all()


def test_given_denominator_is_used_fractions_included():
    loss, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    for denominator in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        value = reduce_loss(loss, mask, "token-mean", denominator=denominator)
        assert value.item() == 6.0
        assert value.dtype == torch.float32
    assert reduce_loss(loss, mask, "token-mean", denominator=torch.tensor(0)).item() == 3.0
    assert reduce_loss(loss, mask, "constant", denominator=4).item() == 0.75


def test_constants_and_single_tokens_are_whitened_to_zero():
    # in fp32 statistics a constant would leave rounding / sqrt(eps) = 6e-4
    constant = torch.full((7, 13), 0.98)
    assert masked_whiten(constant, torch.ones(7, 13, dtype=torch.bool)).abs().max() < 1e-10
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[1, 2] = True
    assert (masked_whiten(torch.randn(2, 3), one) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    x, mask = torch.full((1, 4096), 1.0, dtype=dtype), torch.ones(1, 4096, dtype=torch.bool)
    # 4096 ones do not sum to 4096 in bf16 and their square would overflow fp16
    assert masked_mean(x, mask) == torch.tensor(1.0)
    assert masked_mean(x, mask).dtype == masked_whiten(x, mask).dtype == torch.float32
    assert reduce_loss(x, mask, "sequence-mean-token-sum") == torch.tensor(4096.0)


def test_wrong_argument_is_refused_by_name():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    modes = "'token-mean', 'sequence-mean-token-mean', 'sequence-mean-token-sum', 'constant'"
    for function in (lambda: loss_denominator(mask, "mean"), lambda: reduce_loss(x, mask, "mean", denominator=1)):
        with pytest.raises(ValueError, match=f"^mode is 'mean'; it must be one of {modes}$"):
            function()
    budget = "mode 'constant' divides by it, give the response budget in tokens$"
    with pytest.raises(ValueError, match=f"^max_tokens is None; {budget}"):
        reduce_loss(x, mask, "constant")
    with pytest.raises(ValueError, match=f"^max_tokens is 0; {budget}"):
        loss_denominator(mask, "constant", max_tokens=0)
    boolean = r"^mask has dtype torch.int64; it must be torch.bool \(True = trainable token\)$"
    for function in (masked_mean, masked_whiten, lambda x, m: loss_denominator(m, "token-mean")):
        with pytest.raises(ValueError, match=boolean):
            function(x, mask.long())
    with pytest.raises(ValueError, match=r"^mask has shape \(3,\), the values have \(2, 3\); they must be equal$"):
        masked_mean(x, mask[0])
