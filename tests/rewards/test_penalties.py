from __future__ import annotations

import random

import pytest

from rllava_pl.rewards import RepetitionPenalty, compute_rewards


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((7, 8, 7, 8, 7), -0.5),  # 78 87 78 87: 2 of 4 are repeats
        ((7, 7, 7, 7, 7), -0.75),  # 77 four times: 3 of 4
        ((1, 2, 3, 4), 0.0),
        ((1, 2), 0.0),  # a single n-gram
        ((1,), 0.0),  # shorter than one
        ((), 0.0),
    ],
)
def test_value_is_fraction_of_repeated_pairs(rollout, ids, expected):
    assert RepetitionPenalty(ngram_tokens=2).score(rollout(ids=ids)).value == expected


def test_tokens_of_observations_cost_nothing(rollout):
    # pairs 78, 89 (sampled) | 99 99 99 touch the observation | 12 (sampled)
    ids, sampled = (7, 8, 9, 9, 9, 9, 1, 2), (True, True, True, False, False, False, True, True)
    assert RepetitionPenalty(ngram_tokens=2).score(rollout(ids=ids, sampled=sampled)).value == 0.0
    assert RepetitionPenalty(ngram_tokens=2).score(rollout(ids=ids)).value == pytest.approx(5 / 7 - 1)


def test_no_window_spans_an_observation(rollout):
    reward = RepetitionPenalty(ngram_tokens=2)
    # were the observation (5) cut out, the pair 78 would occur twice
    assert reward.score(rollout(ids=(7, 8, 7, 5, 8), sampled=(True, True, True, False, True))).value == 0.0
    # were windows counted that begin or end in one (5), the pair 75 would occur twice
    assert reward.score(rollout(ids=(7, 5, 7, 5), sampled=(True, False, True, False))).value == 0.0


def test_component_has_the_name_of_the_reward(rollout):
    output = compute_rewards([RepetitionPenalty(ngram_tokens=2, weight=0.5)], [rollout(ids=(7, 8, 7, 8, 7))])
    assert output.rewards == [-0.25]
    assert output.components == {"repetition_penalty": [-0.5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram_tokens": 0}, "ngram_tokens is 0; an n-gram has at least 1 token"),
        ({"weight": -1.0}, "weight is -1.0; a negative one would reward repetition"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RepetitionPenalty(**options)


@pytest.mark.parametrize("bits", [1, 18, 31, 40])
@pytest.mark.parametrize("ngram_tokens", [1, 3, 8, 21])
def test_windows_are_distinguished_for_ids_of_any_size(rollout, bits, ngram_tokens):
    rng = random.Random(bits)
    alphabet = [rng.getrandbits(bits) for _ in range(3)]
    ids = tuple(rng.choices(alphabet, k=400))
    windows = [ids[start : start + ngram_tokens] for start in range(len(ids) - ngram_tokens + 1)]
    value = RepetitionPenalty(ngram_tokens).score(rollout(ids=ids)).value
    assert value == pytest.approx(len(set(windows)) / len(windows) - 1, abs=1e-12)
