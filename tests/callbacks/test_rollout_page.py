"""The page has no external files, and hostile text stays text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from rllava_pl.callbacks.rollout_page import Answer, Moment, data_uri, mean_reward, printable, prompt_text, render
from rllava_pl.types import IMAGE, Message, Prompt

HOSTILE = "</pre></td><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e&lt;"
PICTURE = Image.new("RGB", (20, 10), (255, 0, 0))


class Reader(HTMLParser):
    """Opening tags, and all text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def prompt(text: str = "Which?", answer: str = "a", images: int = 1) -> Prompt:
    return Prompt("p:0", (Message("user", (*(IMAGE,) * images, text)),), (PICTURE,) * images, answer)


def page(answers: list[Answer], sampled: list[Answer] = [], asked: Prompt | None = None) -> Reader:  # noqa: B006
    asked = asked or prompt()
    moments = [Moment(10 * k, [answer], [sampled]) for k, answer in enumerate(answers)]
    return Reader(render("Run", [asked], [[data_uri(image) for image in asked.images]], moments))


def test_hostile_text_from_any_source_stays_text() -> None:
    asked = Prompt(HOSTILE, (Message("user", (IMAGE, HOSTILE)),), (PICTURE,), HOSTILE)
    answer = Answer(HOSTILE, "stop", 1.0, {HOSTILE: 1.0})
    moments = [Moment(0, [answer], [[answer]])]
    read = Reader(render(HOSTILE, [asked], [[data_uri(PICTURE)]], moments))
    assert read.named("script") == []
    assert [attrs["src"][:22] for attrs in read.named("img")] == ["data:image/png;base64,"]
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert (
        read.text.count(shown) == 2 + 3 + 2 * 2
    )  # title and heading; uid, question, expected; text and component, twice


def test_content_policy_forbids_scripts_and_requests() -> None:
    policies = [attrs["content"] for attrs in page([]).named("meta") if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_each_moment_is_a_column_and_each_image_is_embedded_once() -> None:
    read = page([Answer("x", "stop", 0.1), Answer("y", "stop", 0.1), Answer("z", "stop", 0.1)])
    assert len(read.named("th")) == 1 + 3 + 1  # corner, moments, one prompt
    assert len(read.named("img")) == 1
    assert re.findall(r"(Before training|Rollout \d+)0\.10 mean", read.text) == [
        "Before training",
        "Rollout 10",
        "Rollout 20",
    ]


def test_a_cell_shows_reward_components_and_how_the_answer_ended() -> None:
    text = page([Answer("a b", "length", 0.55, {"accuracy": 0.5, "format": 1.0, "iou": float("nan")})]).text
    assert "0.55 accuracy 0.5 · format 1 · cut at the token limit" in text
    assert "iou" not in text  # not named by the reward
    assert "not scored aborted by the engine" in page([Answer("", "abort", None)]).text
    assert "empty" in page([Answer("", "abort", None)]).text


def test_sampled_answers_are_collapsed_under_their_mean() -> None:
    read = page([Answer("a", "stop", 1.0)], sampled=[Answer("b", "stop", 0.0), Answer("c", "stop", 1.0)])
    assert len(read.named("details")) == 1
    assert "2 sampled · mean 0.50" in read.text


def test_colours_range_from_the_worst_to_the_best_reward() -> None:
    read = page([Answer("a", "stop", r) for r in (-2.0, 0.0, 2.0)])
    hues = [attrs["style"] for attrs in read.named("b") if "style" in attrs]
    assert hues == ["--hue:0", "--hue:60", "--hue:120"] * 2  # headings, then cells


def test_equal_rewards_are_shown() -> None:
    assert "0.30" in page([Answer("a", "stop", 0.3)]).text


def test_mean_reward_ignores_unscored_answers() -> None:
    answers = [Answer("", "stop", 1.0), Answer("", "stop", None), Answer("", "stop", 0.0)]
    assert mean_reward(answers) == 0.5
    assert mean_reward(answers[1:2]) != mean_reward(answers[1:2])  # nan


def test_large_images_are_reduced_and_small_ones_kept() -> None:
    def size(image: Image.Image) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(data_uri(image).partition(",")[2]))).size

    assert size(PICTURE) == (20, 10)
    assert size(Image.new("L", (3200, 1600))) == (320, 160)


def test_prompt_text_names_roles_if_there_are_several_messages() -> None:
    assert prompt_text(prompt("Which one?", images=2)) == "Which one?"
    talk = Prompt("p", (Message("system", ("Be brief.",)), Message("user", ("Compare", IMAGE, "and", IMAGE))))
    assert prompt_text(talk) == "system: Be brief.\nuser: Compare and"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc d\u00a0e\u3000f", "a\tb\nc d\u00a0e\u3000f"),
        ("\x00\x1b[31m\x9b\r", "\ufffd\ufffd[31m\ufffd\ufffd"),
        ("\u202e\u2066\ud800", "\ufffd\ufffd\ufffd"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),  # a joined emoji
    ],
)
def test_printable_replaces_control_and_direction_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
