"""The rollout table as one HTML page that needs nothing else: no scripts, no network, images inside.

Everything a model or a data set wrote is escaped, and a content policy forbids scripts and requests besides.
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from rllava_pl.types import FinishReason, ImageSlot, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIDE_PIXELS = 320
"""Larger images are shrunk to this; the page is for looking, not for training."""
_KEPT_CONTROLS = "\n\t\u200c\u200d"


@dataclass(frozen=True)
class Answer:
    """One completion and what the rewards say of it."""

    text: str
    finish_reason: FinishReason
    reward: float | None
    """None: it could not be scored."""
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """All prompts answered by the policy as it was after ``rollout`` passes."""

    rollout: int
    greedy: Sequence[Answer]
    """P: the most likely answer of each prompt."""
    sampled: Sequence[Sequence[Answer]]
    """P: further answers of each prompt, drawn as in training."""


def printable(text: str) -> str:
    """Control, direction-changing and unassigned characters as U+FFFD: they rewrite terminals and reorder lines."""
    return "".join(c if c in _KEPT_CONTROLS or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def prompt_text(prompt: Prompt) -> str:
    """The conversation as people read it, images left out; speakers are named if there is more than the user."""
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
    """An image as PNG inside a URI."""
    file = io.BytesIO()
    thumbnail(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mean_reward(answers: Sequence[Answer]) -> float:
    """Over the answers that could be scored; nan if there is none."""
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    return sum(rewards) / len(rewards) if rewards else math.nan


def render(title: str, prompts: Sequence[Prompt], images: Sequence[Sequence[str]], moments: Sequence[Moment]) -> str:
    """The page: one row a prompt, one column a moment.

    Args:
        title: Heading.
        prompts: P, shown in the first column.
        images: P lists of data URIs.
        moments: Columns, in order.
    """
    scale = _Scale(moments)
    rows = [
        f'<tr><th scope="row">{_prompt(prompt, uris)}</th>'
        + "".join(f"<td>{_cell(moment.greedy[p], moment.sampled[p], scale)}</td>" for moment in moments)
        + "</tr>"
        for p, (prompt, uris) in enumerate(zip(prompts, images, strict=True))
    ]
    columns = "".join(f'<th scope="col">{_heading(moment, scale)}</th>' for moment in moments)
    return _PAGE.format(
        title=_safe(title),
        style=_STYLE,
        count=len(prompts),
        columns=f'<th scope="col" class="corner">Prompt</th>{columns}',
        rows="\n".join(rows),
    )


class _Scale:
    """Reward to a place between the worst (0) and best (1) of the table."""

    def __init__(self, moments: Sequence[Moment]) -> None:
        groups = [group for moment in moments for group in (moment.greedy, *moment.sampled)]
        rewards = [answer.reward for group in groups for answer in group if answer.reward is not None]
        self.low, self.high = min(rewards, default=0.0), max(rewards, default=1.0)

    def badge(self, reward: float | None) -> str:
        if reward is None or math.isnan(reward):
            return '<b class="badge none">not scored</b>'
        share = (reward - self.low) / ((self.high - self.low) or 1.0)
        return f'<b class="badge" style="--hue:{round(120 * share)}">{reward:.2f}</b>'


def _safe(text: str) -> str:
    return escape(printable(text))


def _heading(moment: Moment, scale: _Scale) -> str:
    name = "Before training" if moment.rollout == 0 else f"Rollout {moment.rollout}"
    drawn = [answer for group in moment.sampled for answer in group]
    sampled = f" · sampled {mean_reward(drawn):.2f}" if drawn else ""
    return f"{name}<br>{scale.badge(mean_reward(moment.greedy))} <small>mean{sampled}</small>"


def _prompt(prompt: Prompt, uris: Sequence[str]) -> str:
    pictures = "".join(f'<img src="{uri}" alt="image {k + 1}">' for k, uri in enumerate(uris))
    expected = f'<p class="expected">expected <b>{_safe(prompt.answer)}</b></p>' if prompt.answer else ""
    uid = f'<p class="uid">{_safe(prompt.uid)}</p>'
    text = f'<p class="text">{_safe(prompt_text(prompt))}</p>'
    return f'<div class="prompt"><div>{pictures}</div><div>{text}{expected}{uid}</div></div>'


def _cell(greedy: Answer, sampled: Sequence[Answer], scale: _Scale) -> str:
    if not sampled:
        return _answer(greedy, scale)
    mean = f" · mean {mean_reward(sampled):.2f}"
    drawn = "".join(_answer(answer, scale) for answer in sampled)
    return f"{_answer(greedy, scale)}<details><summary>{len(sampled)} sampled{mean}</summary>{drawn}</details>"


def _answer(answer: Answer, scale: _Scale) -> str:
    parts = [f"{_safe(name)} {value:g}" for name, value in answer.components.items() if not math.isnan(value)]
    if answer.finish_reason != "stop":
        parts.append({"length": "cut at the token limit", "abort": "aborted by the engine"}[answer.finish_reason])
    text = _safe(answer.text) or '<i class="none">empty</i>'
    return f'<div class="answer">{scale.badge(answer.reward)} <small>{" · ".join(parts)}</small><pre>{text}</pre></div>'


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{count} fixed prompts of the validation split. Each cell: the most likely answer, its reward and the parts of it.</p>
<div class="scroll" tabindex="0">
<table>
<thead><tr>{columns}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2125; --dim: #626a73; --line: #dcdfe4; --back: #fff; --head: #f4f5f7; --tone: 34%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --dim: #9aa4af; --line: #363c44; --back: #16191d; --head: #1f2429; --tone: 30%; }
}
* { box-sizing: border-box; }
body { margin: 1.5rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; }
p { margin: 0 0 .5rem; }
small, .uid, .expected, summary, .none { color: var(--dim); font-size: .8rem; font-weight: normal; }
.scroll { max-height: calc(100vh - 8rem); overflow: auto; margin-top: 1rem;
  border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; }
th, td { text-align: left; vertical-align: top; padding: .6rem .8rem; border-bottom: 1px solid var(--line); }
td, thead th { min-width: 15rem; max-width: 28rem; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--head); }
tbody th, .corner { position: sticky; left: 0; min-width: 15rem; max-width: 24rem; background: var(--head); }
thead .corner { z-index: 2; }
tbody th { border-right: 1px solid var(--line); font-weight: normal; }
.prompt { display: flex; flex-wrap: wrap; gap: .7rem; }
.prompt > :last-child { flex: 1 1 7rem; }
img { display: block; min-width: 5.5rem; max-width: 10rem; margin-bottom: .4rem; border-radius: 4px; }
p.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow: auto; }
.expected b { color: var(--ink); }
.uid { overflow-wrap: anywhere; margin: 0; font-size: .7rem; }
.badge { display: inline-block; padding: 0 .45rem; border-radius: 4px; color: #fff; font-variant-numeric: tabular-nums;
  background: hsl(var(--hue) 65% var(--tone)); }
.badge.none { background: var(--dim); color: var(--back); }
pre { margin: .3rem 0 .5rem; font: .85rem/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 14rem; overflow: auto; unicode-bidi: isolate; }
summary { cursor: pointer; }
details .answer { margin-top: .5rem; padding-left: .6rem; border-left: 2px solid var(--line); }
"""
