"""Micro-batches: every sample once, groups whole, nearly the same number of tokens, and the way back."""

from __future__ import annotations

import random

import torch

from rllava_pl.loop.experience import balanced, join_rows, numbered, row_tokens, split
from tests.modules.cases import experience


def test_parts_hold_everything_once_and_differ_by_no_more_than_the_heaviest() -> None:
    rng = random.Random(0)
    for _ in range(200):
        most, weights = rng.randint(1, 5), [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        parts = -(-len(weights) // most)
        chosen = balanced(weights, parts, most)
        assert sorted(k for part in chosen for k in part) == list(range(len(weights)))
        assert len(chosen) == parts and all(1 <= len(part) <= most for part in chosen)


def test_long_prompts_are_spread_over_the_pieces() -> None:
    """Four long and four short in a row: by order (45, 45, 5, 5) x 2, balanced 50 each."""
    chosen = balanced([45, 45, 45, 45, 5, 5, 5, 5], parts=4, most=2)
    assert [sum(45 if k < 4 else 5 for k in part) for part in chosen] == [50] * 4


def test_tokens_of_a_row_are_those_of_the_prompt_and_all_its_responses() -> None:
    """Prompts of 3 tokens; responses of 1 + 4 and 2 + 2."""
    assert row_tokens(experience([[1, 0], [0, 1]], tokens=[1, 4, 2, 2])) == [8, 7]


def test_pieces_find_their_rows_again() -> None:
    tokens = [1, 1, 7, 6, 2, 1, 5, 5, 3, 3]
    whole = experience([[1, 0]] * 5, tokens=tokens)
    for size in (0, 1, 2, 4, 6, 10):
        pieces = split(numbered(whole), size)
        rows = [row for piece in pieces for row in piece.group_N.tolist()]
        assert sorted(rows) == list(range(10)) and all(len(piece) <= (size or 10) for piece in pieces)
        joined = join_rows([piece.engine_logp_NT for piece in pieces], pieces, whole.mask_NT)
        assert torch.equal(joined, whole.engine_logp_NT)
        assert all(piece.rollouts == tuple(whole.rollouts[row] for row in piece.group_N) for piece in pieces)
