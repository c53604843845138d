"""Reward for short answers between tags: ``<answer>4</answer>``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.text import MAX_CHARS, exact, is_tag_name, last_block, strict
from rllava_pl.types import Rollout, Score


class AnswerTagReward(BaseReward):
    """Rewards the right answer in a response of the right format.

    ``format_weight * format + accuracy_weight * accuracy``, where ``format`` is 1 if the response is exactly one block
    of every tag in order and nothing else, and ``accuracy`` is 1 if the last answer block equals the prompt's answer:
    as numbers if both are (0.50 is 1/2), else as text without case, punctuation and articles. A response of more than
    64 Ki characters is not well-formed, and only its end is searched for an answer. The label may be tagged as well.

    Example: the label is 4. ``<answer>4</answer>`` earns 1.0, ``<answer>5</answer>`` 0.1, and
    ``It is <answer>4</answer>`` 0.0, or 0.9 if lenient.

    Args:
        tags: Blocks the response consists of, in order, e.g. ``[think, answer]``; the last is ``answer``.
        format_weight: Value of the right format.
        accuracy_weight: Value of the right answer.
        lenient: Accept the last answer block wherever it stands; otherwise only a well-formed response can be right.
        weight: Factor of this reward in the sum of rewards.
    """

    components = ("accuracy", "format")
    isolation = "none"  # linear in the text and raises on none, as tests/rewards/test_parsers.py checks

    def __init__(
        self,
        tags: Sequence[str] = ("answer",),
        format_weight: float = 0.1,
        accuracy_weight: float = 0.9,
        lenient: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        problem = ""
        if isinstance(tags, str) or not tags:
            problem = f"tags is {tags!r}"
        elif wrong := [tag for tag in tags if not is_tag_name(tag)]:
            problem = f"{wrong[0]!r} is not a tag name; use lower-case ASCII letters, digits and _"
        elif len(set(tags)) < len(tags):
            problem = f"tags {list(tags)} repeat a tag; every block occurs once"
        elif tags[-1] != "answer":
            problem = f"tags {list(tags)} end in {tags[-1]!r}; the last must be 'answer'"
        if problem:
            raise ValueError(f"AnswerTagReward: {problem}; give a list like [think, answer]")
        for option, x in (("format_weight", format_weight), ("accuracy_weight", accuracy_weight)):
            if not (math.isfinite(x) and x >= 0):
                raise ValueError(f"AnswerTagReward: {option} is {x}; it must be finite and not negative")
        self.tags = tuple(tags)
        self.format_weight = format_weight
        self.accuracy_weight = accuracy_weight
        self.lenient = lenient

    def score(self, rollout: Rollout) -> Score:
        """0 to ``format_weight + accuracy_weight``; unscored, as ``no_answer``, if the prompt has no answer."""
        label = last_block(rollout.prompt.answer_text, "answer")
        truth = (rollout.prompt.answer_text if label is None else label).strip()
        if not truth:
            return Score(None, reason="no_answer")
        well_formed, right = _read(rollout.text, truth, self.tags)
        accuracy = float(right and (well_formed or self.lenient))
        value = self.format_weight * well_formed + self.accuracy_weight * accuracy
        return Score(value, {"accuracy": accuracy, "format": float(well_formed)})


@lru_cache(maxsize=256)  # responses of a group repeat each other more and more as a policy learns
def _read(text: str, truth: str, tags: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether the text is well-formed, and whether its last answer block is right."""
    predicted = last_block(text[-MAX_CHARS:], "answer")
    return strict(text, tags), predicted is not None and exact(predicted, truth)
