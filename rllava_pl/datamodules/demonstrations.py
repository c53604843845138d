"""Responses worth imitating, and worse ones, for tasks whose possible answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rllava_pl.functional.seeds import seed_from
from rllava_pl.types import Prompt


def check_share(demonstrations: float) -> None:
    """Refuse a share outside of 0 to 1."""
    if not 0 <= demonstrations <= 1:
        raise ValueError(f"demonstrations is {demonstrations}; it is the share of training prompts, from 0 to 1")


def demonstrate(prompt: Prompt, answers: Sequence[str], share: float, *counters: int | str) -> Prompt:
    """The prompt with a target that gives its answer and a rejected response that gives another, or unchanged.

    It gets both if u < ``share``, where u, uniform in [0, 1), is a function of the counters. So a larger share contains
    the demonstrations of a smaller one.

    Args:
        prompt: Its ``answer`` is the correct one, as text.
        answers: All possible answers, at least two; the wrong one is drawn uniformly from the others.
        share: Probability of a demonstration; 0 never, 1 always.
        *counters: Task, split and index of the prompt.

    >>> prompt = demonstrate(Prompt("p", (), answer="yes"), ("yes", "no"), 1.0, "lamps", "train", 0)
    >>> prompt.target, prompt.rejected
    ('<answer>yes</answer>', '<answer>no</answer>')
    """
    seed = seed_from("demonstrations", *counters)
    if (seed >> 10) * 2.0**-53 >= share:  # the 53 high bits of 63, which a float holds exactly
        return prompt
    others = [answer for answer in answers if answer != prompt.answer]
    wrong = others[seed % len(others)]
    return replace(prompt, target=f"<answer>{prompt.answer}</answer>", rejected=f"<answer>{wrong}</answer>")
