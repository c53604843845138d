r"""Reward for answers in a box: ``<think>...</think> ... \boxed{4}``."""

from __future__ import annotations

import logging
import math
from itertools import islice
from typing import Literal

from rllava_pl.rewards.base import BaseReward
from rllava_pl.rewards.formulas import has_math_verify, math_equal
from rllava_pl.rewards.text import MAX_CHARS, answer_scope, last_boxed, tag_tokens
from rllava_pl.types import Rollout, Score

log = logging.getLogger(__name__)


class MathReward(BaseReward):
    r"""Rewards the right answer in a box, in a response of the right format.

    ``format_weight * format + accuracy_weight * accuracy``. ``accuracy`` is 1 if the last ``\boxed{...}`` equals the
    prompt's answer by ``formulas.math_equal``, ``format`` is 1 if the response is one think block and then anything
    with a box. Formulas that differ as text and as numbers are compared by math-verify, which needs
    ``rllava-pl[math]``; without it they count as wrong, with the flag ``symbolic_unavailable``. A formula that the
    comparison cannot finish in two seconds makes the sample wrong, with the flag ``grader_timeout``.

    Example: the label is ``\sqrt{12}``. ``<think>...</think> \boxed{2\sqrt{3}}`` scores 1.0, without thoughts 0.9.

    Args:
        format_weight: Value of the right format.
        accuracy_weight: Value of the right answer.
        scope: Where the box is searched: answer, behind the last ``</think>``, or anywhere.
        weight: Factor of this reward in the sum of rewards.
    """

    components = ("accuracy", "format")
    timeout_seconds = 2.0
    text_at_fault = True

    def __init__(
        self,
        format_weight: float = 0.1,
        accuracy_weight: float = 0.9,
        scope: Literal["answer", "anywhere"] = "answer",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        for option, x in (("format_weight", format_weight), ("accuracy_weight", accuracy_weight)):
            if not (math.isfinite(x) and x >= 0):
                raise ValueError(f"MathReward: {option} is {x}; it must be finite and not negative")
        self.format_weight = format_weight
        self.accuracy_weight = accuracy_weight
        self.scope = scope
        if not has_math_verify():
            log.warning("MathReward: formulas are compared as text and numbers only; pip install 'rllava-pl[math]'")

    def load(self) -> None:
        """Import the computer algebra system, and compare a first formula, which takes long."""
        math_equal(r"\frac{2\sqrt{3}}{x^2+1}", r"\frac{\sqrt{12}}{x^2+1}")

    def score(self, rollout: Rollout) -> Score:
        """0 to ``format_weight + accuracy_weight``; unscored, as ``no_answer``, if the prompt has no answer."""
        truth = rollout.prompt.answer_text.strip()
        if not truth:
            return Score(None, reason="no_answer")
        text = rollout.text[-MAX_CHARS:]
        box = last_boxed(answer_scope(text) if self.scope == "answer" else text)
        if box is not None:
            right, flag = math_equal(box, truth)
        else:
            right, flag = False, "truncated" if rollout.finish_reason == "length" else ""
        flags = tuple(filter(None, ("too_long" if len(text) < len(rollout.text) else "", flag)))
        tags = list(islice(tag_tokens(text, ("think",)), 3))
        one_block = [tag["slash"] for tag in tags] == ["", "/"] and not text[: tags[0].start()].strip()
        form = float(one_block and not flags and last_boxed(text[tags[1].end() :]) is not None)
        value = self.format_weight * form + self.accuracy_weight * right
        return Score(value, {"accuracy": float(right), "format": form}, flags=flags)
