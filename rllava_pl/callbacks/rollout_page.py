"""The rollout table as one HTML page without scripts and external files; images are embedded.

The template escapes all text of models and data sets, and a content security policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL.Image import Image

from rllava_pl.types import FinishReason, ImageSlot, Prompt

IMAGE_SIDE_PIXELS = 320
"""Larger images are reduced to this."""
_KEPT_CONTROLS = "\n\t\u200c\u200d"


@dataclass(frozen=True)
class Answer:
    """One completion and its rewards."""

    text: str
    finish_reason: FinishReason
    reward: float | None
    """None: it could not be scored."""
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """Answers to all prompts by the policy after so many rollouts."""

    rollout: int
    greedy: Sequence[Answer]
    """P: the most likely answer of each prompt."""
    sampled: Sequence[Sequence[Answer]]
    """P: further answers to each prompt, sampled as in training."""


def printable(text: str) -> str:
    """Replace control, direction-changing and unassigned characters, which rewrite terminals and reorder lines."""
    return "".join(c if c in _KEPT_CONTROLS or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def prompt_text(prompt: Prompt) -> str:
    """The conversation without images; roles are named if there are several messages."""
    named = len(prompt.messages) > 1
    texts = []
    for message in prompt.messages:
        text = " ".join(part.strip() for part in message.parts if not isinstance(part, ImageSlot))
        texts.append(f"{message.role}: {text}" if named else text)
    return "\n".join(texts)


def thumbnail(image: Image) -> Image:
    """A copy of at most ``IMAGE_SIDE_PIXELS`` a side."""
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS))
    return small


def data_uri(image: Image) -> str:
    """A thumbnail as PNG inside a URI."""
    file = io.BytesIO()
    thumbnail(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mean_reward(answers: Sequence[Answer]) -> float:
    """Over the answers that could be scored; nan if there is none."""
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    return sum(rewards) / len(rewards) if rewards else math.nan


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: printable(x) if isinstance(x, str) and not isinstance(x, Markup) else x,
    )
    return environment.get_template("rollout_page.html.j2")


def render(title: str, prompts: Sequence[Prompt], images: Sequence[Sequence[str]], moments: Sequence[Moment]) -> str:
    """The page: one row for each of P prompts with their P lists of images as data URIs, one column a moment."""
    groups = [group for moment in moments for group in (moment.greedy, *moment.sampled)]
    rewards = [answer.reward for group in groups for answer in group if answer.reward is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=1.0)
    return _template().render(
        title=title,
        prompts=prompts,
        images=images,
        moments=moments,
        hue=lambda reward: round(120 * (reward - low) / ((high - low) or 1.0)),  # red to green
        mean_reward=mean_reward,
        prompt_text=prompt_text,
        details=_details,
    )


def _details(answer: Answer) -> list[str]:
    """Components of the reward, and why the answer ended if not by an end token."""
    parts = [f"{name} {value:g}" for name, value in answer.components.items() if not math.isnan(value)]
    ends = {"length": "cut at the token limit", "abort": "aborted by the engine"}
    return [*parts, ends[answer.finish_reason]] if answer.finish_reason in ends else parts
