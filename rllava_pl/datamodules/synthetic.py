"""Drawn images with exact answers: tasks that a tiny vision-language model learns within minutes on a CPU.

An image is a pure function of (task, split, index); no file is read and none is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from rllava_pl.datamodules.base import BaseDataModule
from rllava_pl.datamodules.demonstrations import check_share, demonstrate
from rllava_pl.datamodules.tables import LazySequence
from rllava_pl.functional.seeds import seed_from
from rllava_pl.types import IMAGE, Message, Prompt

SIDE_PIXELS = 56
SHAPES = ("circle", "square", "triangle", "cross")
COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 180, 60),
        "blue": (50, 80, 230),
        "yellow": (235, 215, 50),
        "purple": (150, 60, 190),
        "white": (245, 245, 245),
    }
)

TaskName = Literal["color", "count", "where"]


@dataclass(frozen=True)
class VisionTask:
    """A question about a drawn image."""

    question: str
    """Asked below every image."""
    answers: tuple[str, ...]
    """All possible answers, equally frequent; chance level is 1 / len(answers)."""
    draw: Callable[[np.random.Generator, str], Image.Image]
    """Draws an image to which the second argument is the answer."""


class DrawnPrompts(LazySequence[Prompt]):
    """Prompts ``0 .. size-1`` of one task and split, drawn on access (0.1 ms an image, so nothing is kept).

    Args:
        task: Name in ``TASKS``.
        split: Enters the seed of every image, so that splits share none.
        size: Number of prompts.
        demonstrations: Share of them that carry a target and a rejected response.
    """

    def __init__(self, task: TaskName, split: str, size: int, demonstrations: float = 0.0) -> None:
        self.task, self.split, self.size, self.demonstrations = task, split, size, demonstrations

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Prompt:
        """Draw one prompt."""
        task = TASKS[self.task]
        answer = task.answers[index % len(task.answers)]  # exactly balanced, not only on average
        rng = np.random.default_rng(seed_from("synthetic", self.task, self.split, index))
        uid = f"{self.task}-{self.split}:{index}"
        message = Message("user", (IMAGE, task.question))
        prompt = Prompt(uid, (message,), (task.draw(rng, answer),), answer, source=f"synthetic {uid}")
        return demonstrate(prompt, task.answers, self.demonstrations, self.task, self.split, index)


class SyntheticVisionDataModule(BaseDataModule):
    """Images of 56 x 56 pixels drawn on access, with a question whose answer is one word.

    ``color``: one shape, six colours ("What color is the shape?"). ``count``: one to five equal dots ("How many dots
    are there?"). ``where``: one shape near an edge ("Where is the shape?" left, right, top or bottom).

    Training, validation and test images are disjoint, and the same whatever ``seed`` is.

    Args:
        task: ``color``, ``count`` or ``where``.
        train_size: Training prompts (one epoch).
        val_size: Validation prompts.
        test_size: Test prompts.
        demonstrations: Share of the training prompts that carry a target, ``<answer>red</answer>``, and a rejected
            response with another answer. Validation and test prompts all do.
        **loader_options: Those of ``BaseDataModule``.
    """

    def __init__(
        self,
        task: TaskName = "color",
        train_size: int = 4096,
        val_size: int = 384,
        test_size: int = 384,
        demonstrations: float = 0.0,
        **loader_options: int,
    ) -> None:
        super().__init__(**loader_options)
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
        check_share(demonstrations)
        self.task: TaskName = task
        self.demonstrations = demonstrations
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size

    def setup(self, stage: str) -> None:
        """Make the three splits; images are drawn on access."""
        self.train_prompts = DrawnPrompts(self.task, "train", self.train_size, self.demonstrations)
        self.val_prompts = DrawnPrompts(self.task, "val", self.val_size, demonstrations=1.0)
        self.test_prompts = DrawnPrompts(self.task, "test", self.test_size, demonstrations=1.0)


def draw_color(rng: np.random.Generator, answer: str) -> Image.Image:
    """One shape of radius 7-13 in the colour ``answer``, anywhere."""
    image = _background(rng)
    radius = int(rng.integers(7, 14))
    x, y = (int(v) for v in rng.integers(radius + 1, SIDE_PIXELS - radius - 1, size=2))
    _draw_shape(ImageDraw.Draw(image), SHAPES[rng.integers(len(SHAPES))], x, y, radius, COLORS[answer])
    return image


def draw_count(rng: np.random.Generator, answer: str) -> Image.Image:
    """``answer`` equal white dots that do not touch: each anywhere in another cell of a 3 x 3 grid."""
    image = _background(rng)
    canvas, radius, cell = ImageDraw.Draw(image), int(rng.integers(4, 7)), SIDE_PIXELS / 3
    for place in rng.permutation(9)[: int(answer)]:
        slack = cell / 2 - radius - 1
        dx, dy = rng.uniform(-slack, slack, size=2)
        x, y = (place % 3 + 0.5) * cell + dx, (place // 3 + 0.5) * cell + dy
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS["white"])
    return image


def draw_where(rng: np.random.Generator, answer: str) -> Image.Image:
    """One shape of any colour, 15-18 pixels from the centre towards ``answer`` and within 3 pixels of it across."""
    image = _background(rng)
    away, across = int(rng.integers(15, 19)), int(rng.integers(-3, 4))
    along = -away if answer in ("left", "top") else away
    dx, dy = (along, across) if answer in ("left", "right") else (across, along)
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS.values())[rng.integers(len(COLORS))]
    center = SIDE_PIXELS // 2
    _draw_shape(ImageDraw.Draw(image), shape, center + dx, center + dy, int(rng.integers(6, 10)), color)
    return image


def _background(rng: np.random.Generator) -> Image.Image:
    """Dark grey noise: mean drawn from 15-70, standard deviation 8."""
    grey = rng.normal(rng.uniform(15, 70), 8, size=(SIDE_PIXELS, SIDE_PIXELS))
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: tuple[int, int, int]
) -> None:
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=color)
    elif shape == "square":
        canvas.rectangle((left, top, right, bottom), fill=color)
    elif shape == "triangle":
        canvas.polygon(((x, top), (left, bottom), (right, bottom)), fill=color)
    else:
        arm = radius // 3
        canvas.rectangle((x - arm, top, x + arm, bottom), fill=color)
        canvas.rectangle((left, y - arm, right, y + arm), fill=color)


TASKS: Mapping[TaskName, VisionTask] = MappingProxyType(
    {
        "color": VisionTask("What color is the shape?", tuple(COLORS), draw_color),
        "count": VisionTask("How many dots are there?", ("1", "2", "3", "4", "5"), draw_count),
        "where": VisionTask("Where is the shape?", ("left", "right", "top", "bottom"), draw_where),
    }
)
"""All tasks by name."""
