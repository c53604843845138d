"""Texts made to slow parsers down, or to make them fail: the texts of the benchmark, fewer of them."""

from __future__ import annotations

import pytest

from benchmarks.parsers import READERS, REWARDS, measure, texts


def test_texts_are_the_same_for_a_seed_and_as_long_as_they_say():
    some = list(texts(200, seed=1))
    assert some == list(texts(200, seed=1)) != list(texts(200, seed=2))
    assert max(map(len, some)) == 60_000


def test_no_text_makes_a_parser_raise_or_hang():
    """CPU time, and a bound ten times what is measured: a quadratic parser needs minutes for these."""
    seconds = measure(300, seed=0)
    assert seconds.keys() == READERS.keys() | REWARDS.keys()
    assert max(max(values) for values in seconds.values()) < 0.5


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_thousand_texts_within_milliseconds():
    for name, values in measure(50_000, seed=1).items():
        values.sort()
        if name in READERS:
            assert values[-50] <= 0.005, name  # one in a thousand may take longer
        assert values[-1] <= 0.05, name
