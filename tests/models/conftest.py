"""Tiny models of every family, built once a session, and batches that mix everything a batch can mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rllava_pl.models import VLM, tiny
from rllava_pl.models.policy import Policy
from rllava_pl.types import IMAGE, Message, PolicyBatch, Prompt

FAMILIES = ("idefics3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("tiny")

    def path(family: str) -> str:
        directory = root / family
        if not directory.is_dir():
            question, answers = "What color is the shape?", ["red", "blue"]
            tiny.build(Path(directory), family=family, questions=[question], answers=answers, warmup_steps=0)
        return str(directory)

    return path


@pytest.fixture(scope="session")
def load(tiny_path: Callable[[str], str]) -> Callable[..., Policy]:
    def load(family: str, **options: object) -> Policy:
        return VLM(tiny_path(family), **options).load()

    return load


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8))


def prompts(image_counts: Sequence[int]) -> list[Prompt]:
    """One prompt a count, with that many pictures and texts of different lengths."""
    return [
        Prompt(
            uid=f"test:{p}",
            messages=(Message("user", (IMAGE,) * count + ("What color is the shape?" + " Look well." * (p % 3),)),),
            images=tuple(picture(10 * p + k) for k in range(count)),
            answer="red",
        )
        for p, count in enumerate(image_counts)
    ]


def random_batch(policy: Policy, image_counts: Sequence[int], *, group: int = 3, tokens: int = 5) -> PolicyBatch:
    """Prompts with random ragged responses of text tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = len(image_counts) * group
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    ids = torch.randint(20, 200, (rows, tokens), generator=generator)
    return PolicyBatch(tuple(policy.encode(prompts(image_counts))), group, ids, torch.arange(tokens) < lengths[:, None])
