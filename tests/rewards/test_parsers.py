"""Texts made to slow parsers down or to make them raise: fewer of the texts of the benchmark."""

from __future__ import annotations

import pytest

from benchmarks.parsers import PARSERS, REWARDS, measure, texts


def test_texts_are_reproducible_and_reach_their_longest_length():
    some = list(texts(200, seed=1))
    assert some == list(texts(200, seed=1)) != list(texts(200, seed=2))
    assert max(map(len, some)) == 60_000


def test_no_text_makes_a_parser_raise_or_hang():
    """CPU time, and a bound ten times what is measured: a quadratic parser needs minutes for these."""
    seconds = measure(300, seed=0)
    assert seconds.keys() == PARSERS.keys() | REWARDS.keys()
    assert max(max(values) for values in seconds.values()) < 0.5


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_thousand_texts_are_parsed_within_milliseconds():
    for name, values in measure(50_000, seed=1).items():
        values.sort()
        if name in PARSERS:
            assert values[-50] <= 0.005, name  # one in a thousand may take longer
        assert values[-1] <= 0.05, name
