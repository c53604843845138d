"""Penalties: rewards that are 0 at best and read token ids instead of text."""

from __future__ import annotations

from rllava_pl.rewards.base import BaseReward
from rllava_pl.types import Rollout, Score


class RepetitionPenalty(BaseReward):
    """Minus the fraction of repeated n-grams: ``distinct / all - 1``, from 0 (no repeat) towards -1.

    Only n-grams count of which the policy sampled every token, not those of observations or hints. A response shorter
    than one n-gram scores 0. O(T log T log n) for n-grams in T tokens.

    Example: with ``ngram_tokens=2`` the response ``7 8 7 8 7`` has the pairs 78, 87, 78, 87: 2 of 4 are repeats, -0.5.

    Args:
        ngram_tokens: Length of the n-grams in tokens; short ones also penalise ordinary language.
        weight: Factor of this penalty in the sum of rewards, not negative.
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
        windows_T, reach = rollout.response_ids, 1
        if len(windows_T) < self.ngram_tokens:
            return Score(0.0)
        while reach < self.ngram_tokens:  # an integer for every window of ``reach`` tokens, equal for equal windows
            ranks_T = windows_T.unique(return_inverse=True)[1]
            step = min(reach, self.ngram_tokens - reach)  # the last two windows may overlap
            windows_T = ranks_T[:-step] << 32 | ranks_T[step:]
            reach += step
        ngrams = windows_T[rollout.sampled_mask.unfold(0, reach, 1).all(1)]
        return Score(len(ngrams.unique()) / len(ngrams) - 1.0 if len(ngrams) else 0.0)
