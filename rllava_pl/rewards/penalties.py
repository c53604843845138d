"""Penalties: rewards that are 0 at best and read token ids instead of text."""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import Tensor

from rllava_pl.rewards.base import BaseReward
from rllava_pl.types import Rollout, Score


class RepetitionPenalty(BaseReward):
    """Minus the fraction of repeated n-grams: ``distinct / all - 1``, from 0 (no repeat) towards -1.

    Only n-grams count of which the policy sampled every token, not those of observations or hints. A response shorter
    than one n-gram scores 0. O(T log T) in the tokens of the response.

    Example: with ``ngram_tokens=2`` the response ``7 8 7 8 7`` has the pairs 78, 87, 78, 87: 2 of 4 are repeats, -0.5.

    Args:
        ngram_tokens: Length of the n-grams in tokens; short ones also penalise ordinary language.
        weight: Factor of this penalty in the sum of rewards, not negative.

    Raises:
        ValueError: If ``ngram_tokens`` is below 1, or the weight is negative or not finite.
    """

    isolation = "none"  # linear in the tokens and raises on none

    def __init__(self, ngram_tokens: int = 8, weight: float = 1.0) -> None:
        super().__init__(weight)
        if ngram_tokens < 1:
            raise ValueError(f"RepetitionPenalty: ngram_tokens is {ngram_tokens}; an n-gram has at least 1 token")
        if weight < 0:
            raise ValueError(f"RepetitionPenalty: weight is {weight}; a negative one would reward repetition")
        self.ngram_tokens = ngram_tokens

    def score(self, rollout: Rollout) -> Score:
        """-1 to 0."""
        if len(rollout.response_ids) < self.ngram_tokens:
            return Score(0.0)
        sampled = rollout.sampled_mask.unfold(0, self.ngram_tokens, 1).all(1)
        ngrams = _windows(rollout.response_ids, self.ngram_tokens)[sampled]
        return Score(len(ngrams.unique()) / len(ngrams) - 1.0 if len(ngrams) else 0.0)


def _windows(ids_T: Tensor, length: int) -> Tensor:
    """An integer for every window, equal where the windows are equal: as many ids in one integer as 63 bits hold.

    Once two no longer fit, the integers are replaced by their ranks, and longer windows combined from shorter ones.
    """
    words, reach = ids_T, 1
    while reach < length:
        bits = max(int(words.max()).bit_length(), 1)
        if 63 // bits < 2:
            words = words.unique(return_inverse=True)[1]
            continue
        longer = min(63 // bits * reach, length)
        starts = [*range(0, longer - reach, reach), longer - reach]  # the last may overlap
        count = len(ids_T) - longer + 1
        words = reduce(or_, (words[start : start + count] << bits * k for k, start in enumerate(starts)))
        reach = longer
    return words
