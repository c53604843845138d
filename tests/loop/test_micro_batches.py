"""Micro-batches: every sample once, whole groups where they fit, nearly equal in tokens; smaller ones out of memory."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from rllava_pl.loop.micro_batches import (
    MicroBatches,
    balance,
    is_out_of_memory,
    join_rows,
    numbered,
    row_tokens,
)
from rllava_pl.loop.options import Batching
from rllava_pl.types import ScoredBatch
from tests.modules.cases import scored

TOKENS = [1, 1, 7, 6, 2, 1, 5, 5, 3, 3]


def test_balance_uses_every_position_once_within_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(200):
        most, weights = rng.randint(1, 5), [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        parts = -(-len(weights) // most)
        chosen = balance(weights, parts, most)
        assert sorted(k for part in chosen for k in part) == list(range(len(weights)))
        assert len(chosen) == parts and all(1 <= len(part) <= most for part in chosen)


def test_long_prompts_are_spread_over_micro_batches() -> None:
    """Four long and four short in a row: by order (45, 45, 5, 5) x 2, balanced 50 each."""
    chosen = balance([45, 45, 45, 45, 5, 5, 5, 5], parts=4, most=2)
    assert [sum(45 if k < 4 else 5 for k in part) for part in chosen] == [50] * 4


def test_row_tokens_count_the_prompt_once_and_all_its_responses() -> None:
    """Prompts of 3 tokens; responses of 1 + 4 and 2 + 2."""
    assert row_tokens(scored([[1, 0], [0, 1]], tokens=[1, 4, 2, 2])) == [8, 7]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 10])
def test_rows_of_micro_batches_are_found_again(size: int) -> None:
    whole = scored([[1, 0]] * 5, tokens=TOKENS)
    parts = MicroBatches(Batching()).split(numbered(whole), size)
    rows = [row for part in parts for row in part.group_N.tolist()]
    assert sorted(rows) == list(range(10)) and all(len(part) <= size for part in parts)
    joined = join_rows([part.engine_logp_NT for part in parts], parts, whole.trained_mask_NT)
    assert torch.equal(joined, whole.engine_logp_NT)
    assert all(part.rollouts == tuple(whole.rollouts[row] for row in part.group_N) for part in parts)


def test_size_that_does_not_divide_the_group_cuts_it_into_unequal_parts() -> None:
    parts = MicroBatches(Batching()).split(scored([[1, 0, 0, 1]] * 2), 3)
    assert sorted(map(len, parts)) == [1, 1, 3, 3]


def test_rows_that_belong_together_are_never_separated() -> None:
    whole = numbered(scored([[1, 0, 0, 1]] * 2))
    for size in (1, 2, 3):
        parts = MicroBatches(Batching(), rows_together=2).split(whole, size)
        assert sorted(part.group_N.tolist() for part in parts) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("limit", [10, 11, 12, 16, 24, 50])
def test_token_limit_holds_while_a_single_row_fits(limit: int) -> None:
    """Prompts of 3 tokens, the longest response has 7: 10 tokens hold any row."""
    whole = numbered(scored([[1, 0]] * 5, tokens=TOKENS))
    parts = MicroBatches(Batching(micro_batch_tokens=limit)).split(whole, len(whole))
    assert all(sum(row_tokens(part)) <= limit for part in parts)
    assert sorted(row for part in parts for row in part.group_N.tolist()) == list(range(10))


@pytest.mark.parametrize("group", [[1], [1, 0]])
@pytest.mark.parametrize("together", [1, 2])
def test_row_above_the_token_limit_is_alone(group: list[float], together: int) -> None:
    together = min(together, len(group))
    whole = numbered(scored([group] * 3, tokens=[5, 2, 4, 4, 3, 5][: 3 * len(group)]))
    parts = MicroBatches(Batching(micro_batch_tokens=1), together).split(whole, len(whole))
    assert {len(part) for part in parts} == {together}
    assert sorted(row for part in parts for row in part.group_N.tolist()) == list(range(len(whole)))


# -- out of memory ----------------------------------------------------------------------------------------------------


def fits(rows: int, tried: list[int]) -> Callable[[ScoredBatch, bool], int]:
    """Work for which memory holds so many rows."""

    def work(batch: ScoredBatch, last: bool) -> int:
        tried.append(len(batch))
        if len(batch) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch)

    return work


def test_size_is_halved_until_it_fits_and_remembered() -> None:
    runner, tried, undone = MicroBatches(Batching()), [], []
    batch = scored([[1, 0, 0, 1]] * 2)
    results = runner.run(batch, fits(3, tried), can_retry=True, before_retry=lambda: undone.append(len(tried)))
    assert tried == [8, 4, 2, 2, 2, 2] and undone == [1, 2]
    assert [result.value for result in results] == [2, 2, 2, 2] and runner.size == 2
    tried.clear()
    runner.run(batch, fits(3, tried), can_retry=True)
    assert tried == [2, 2, 2, 2]


def test_only_the_last_micro_batch_is_marked_as_last() -> None:
    marks: list[bool] = []
    runner = MicroBatches(Batching(micro_batch_size=2))
    runner.run(scored([[1, 0]] * 3), lambda batch, last: marks.append(last), can_retry=True)
    assert marks == [False, False, True]


def test_largest_micro_batch_comes_first_where_gradients_are_exchanged() -> None:
    sizes: list[int] = []
    runner = MicroBatches(Batching(micro_batch_size=2))
    batch = scored([[1, 0]] * 3, tokens=[1, 1, 4, 4, 2, 2])
    runner.run(batch, lambda part, last: sizes.append(sum(row_tokens(part))), can_retry=True, exchanges_gradients=True)
    assert sizes == [11, 7, 5]


def test_error_between_micro_batches_ends_the_work() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        MicroBatches(Batching()).run(scored([[1, 0]]), lambda *_: None, can_retry=True, between=stop)


def test_single_row_that_does_not_fit_is_an_error_with_advice() -> None:
    with pytest.raises(RuntimeError, match=r"with a single completion in a micro-batch: lower sampling\.max_tokens"):
        MicroBatches(Batching()).run(scored([[1, 0]]), fits(0, []), can_retry=True)


def test_strategy_that_cannot_retry_is_an_error_that_names_the_option() -> None:
    with pytest.raises(RuntimeError, match=r"a sharded pass cannot be repeated; set batching\.micro_batch_size to 2"):
        MicroBatches(Batching()).run(scored([[1, 0]] * 2), fits(2, []), can_retry=False)


def test_other_errors_are_raised_as_they_are() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    runner = MicroBatches(Batching())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        runner.run(scored([[1, 0]]), fail, can_retry=True)
    assert runner.size == 0 and not is_out_of_memory(RuntimeError("expected scalar type Float"))
