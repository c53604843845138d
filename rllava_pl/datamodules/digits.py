"""Reading handwritten digits: scans that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from rllava_pl.datamodules.base import BaseDataModule
from rllava_pl.datamodules.demonstrations import check_share, demonstrate
from rllava_pl.functional.seeds import permutation, seed_from
from rllava_pl.types import IMAGE, Message, Prompt

DIGITS = tuple("0123456789")
QUESTION = "Which digit is it?"
ROWS = 1797
SIDE_PIXELS = 56
TEST_ROWS, VAL_ROWS = 400, 192  # the rest, 1,205 rows, is for training


class DigitsDataModule(BaseDataModule):
    """1,797 scanned digits (8 x 8, 17 grey levels), shown as 56 x 56 RGB; the answer is one digit, chance is 10 %.

    Split by a fixed permutation, whatever ``seed`` is: 1,205 for training, 192 for validation, 400 for test. The uid is
    ``digits:<row of the file>``. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998 (its test part, as distributed with scikit-learn).

    Args:
        demonstrations: Share of the training prompts that carry a target, ``<answer>4</answer>``, and a rejected
            response with another digit. Validation and test prompts all do.
        **loader_options: Those of ``BaseDataModule``.
    """

    def __init__(self, demonstrations: float = 0.0, **loader_options: int) -> None:
        super().__init__(**loader_options)
        check_share(demonstrations)
        self.demonstrations = demonstrations

    def setup(self, stage: str) -> None:
        """Read the file once and split it.

        Raises:
            ModuleNotFoundError: scikit-learn, whose package holds the file, is not installed.
        """
        if len(self.train_prompts):
            return
        prompts, order = load_digit_prompts(), permutation(seed_from("digits", "split"), ROWS)

        def part(split: str, rows: Sequence[int], share: float) -> list[Prompt]:
            return [demonstrate(prompts[row], DIGITS, share, "digits", split, row) for row in rows]

        self.test_prompts = part("test", order[:TEST_ROWS], 1.0)
        self.val_prompts = part("val", order[TEST_ROWS : TEST_ROWS + VAL_ROWS], 1.0)
        self.train_prompts = part("train", order[TEST_ROWS + VAL_ROWS :], self.demonstrations)


def load_digit_prompts() -> Sequence[Prompt]:
    """All 1,797 digits as prompts, in the order of the file, which is read without importing scikit-learn."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'the handwritten digits come with scikit-learn, which is not installed: pip install "rllava-pl[demo]"'
        )
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    levels = (table[:, :64] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)  # 0..16 to 0..255
    messages, size = (Message("user", (IMAGE, QUESTION)),), (SIDE_PIXELS, SIDE_PIXELS)
    prompts = []
    for row, (grey, label) in enumerate(zip(levels, table[:, 64], strict=True)):
        image = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB")
        source = f"scikit-learn digits.csv.gz row {row}"
        prompts.append(Prompt(f"digits:{row}", messages, (image,), str(int(label)), source=source))
    return prompts
