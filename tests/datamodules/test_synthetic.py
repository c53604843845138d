"""Drawn pictures: pure functions of (task, split, index) whose pixels hold the answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.datamodules.synthetic import COLORS, TASKS, DrawnPrompts

NAMES = list(TASKS)


def foreground(image: Image.Image) -> np.ndarray:
    """True where a pixel is no background: the noise stays below 130 and is grey, the shapes are bright or coloured."""
    pixels = np.asarray(image).astype(int)
    return (pixels.max(-1) > 130) | (np.ptp(pixels, axis=-1) > 60)


def blobs(mask: np.ndarray) -> int:
    """Number of 4-connected regions, by flood fill."""
    mask, count = mask.copy(), 0
    while mask.any():
        count += 1
        stack = [tuple(np.argwhere(mask)[0])]
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return count


@pytest.mark.parametrize("task", NAMES)
def test_same_index_gives_the_same_image(task):
    one, two = DrawnPrompts(task, "train", 10), DrawnPrompts(task, "train", 20)
    assert [p.images[0].tobytes() for p in one] == [p.images[0].tobytes() for p in two[:10]]
    assert [p.answer for p in one] == [p.answer for p in two[:10]]


@pytest.mark.parametrize("task", NAMES)
def test_splits_share_neither_images_nor_uids(task):
    data = SyntheticVisionDataModule(task=task, train_size=60, val_size=60, test_size=60)
    data.setup("fit")
    prompts = [*data.train_prompts, *data.val_prompts, *data.test_prompts]
    assert len({p.images[0].tobytes() for p in prompts}) == 180
    assert len({p.uid for p in prompts}) == 180


@pytest.mark.parametrize("task", NAMES)
def test_answers_are_balanced_and_the_question_has_one_slot(task):
    answers = TASKS[task].answers
    prompts = DrawnPrompts(task, "val", 10 * len(answers))
    assert Counter(p.answer for p in prompts) == dict.fromkeys(answers, 10)
    assert prompts[0].messages[0].parts[1:] == (TASKS[task].question,)
    assert prompts[0].messages[0].image_slots == 1
    assert {(p.images[0].size, p.images[0].mode) for p in prompts} == {((56, 56), "RGB")}


def test_color_is_the_color_of_the_shape():
    for prompt in DrawnPrompts("color", "train", 60):
        pixels = np.asarray(prompt.images[0])[foreground(prompt.images[0])]
        assert len(pixels) > 50
        assert (pixels == COLORS[prompt.answer]).all()


def test_count_is_the_number_of_separate_equal_dots():
    for prompt in DrawnPrompts("count", "train", 60):
        mask = foreground(prompt.images[0])
        assert blobs(mask) == int(prompt.answer)


def test_where_is_the_side_of_the_shape():
    for prompt in DrawnPrompts("where", "train", 60):
        y, x = np.argwhere(foreground(prompt.images[0])).mean(0) - 28
        far, near = (x, y) if prompt.answer in ("left", "right") else (y, x)
        assert abs(near) < 8 < abs(far)
        assert (far < 0) == (prompt.answer in ("left", "top"))


@pytest.mark.parametrize("task", NAMES)
def test_demonstrations_change_neither_images_nor_order(task):
    plain, shown = DrawnPrompts(task, "train", 100), DrawnPrompts(task, "train", 100, demonstrations=0.5)
    assert not any(p.target or p.rejected for p in plain)
    assert 30 < sum(bool(p.target) for p in shown) < 70  # 50 on average, standard deviation 5
    for before, after in zip(plain, shown, strict=True):
        assert before.images[0].tobytes() == after.images[0].tobytes()
        assert (before.uid, before.messages, before.answer) == (after.uid, after.messages, after.answer)
        assert bool(after.target) == bool(after.rejected)


def test_demonstration_is_the_answer_in_tags_and_the_rejected_one_another():
    tagged = {f"<answer>{color}</answer>" for color in COLORS}
    for prompt in DrawnPrompts("color", "train", 30, demonstrations=1.0):
        assert prompt.target == f"<answer>{prompt.answer}</answer>"
        assert prompt.rejected in tagged - {prompt.target}


def test_demonstrations_are_drawn_by_task_split_and_index():
    drawn = {
        (task, split): [bool(p.target) for p in DrawnPrompts(task, split, 64, demonstrations=0.5)]
        for task, split in (("color", "train"), ("color", "test"), ("count", "train"))
    }
    assert len({tuple(draw) for draw in drawn.values()}) == 3
    assert drawn["color", "train"][:8] == [bool(p.target) for p in DrawnPrompts("color", "train", 8, 0.5)]


def test_validation_and_test_prompts_always_carry_both_responses():
    data = SyntheticVisionDataModule(train_size=60, val_size=12, test_size=12)
    data.setup("fit")
    assert not any(p.target or p.rejected for p in data.train_prompts)
    assert all(p.target and p.rejected for p in (*data.val_prompts, *data.test_prompts))
    data = SyntheticVisionDataModule(train_size=60, demonstrations=1.0)
    data.setup("fit")
    assert all(p.target and p.rejected for p in data.train_prompts)


def test_out_of_range_raises_so_that_iteration_ends():
    assert len(list(DrawnPrompts("color", "val", 3))) == 3
    with pytest.raises(IndexError, match="out of range"):
        DrawnPrompts("color", "val", 3)[3]


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'shape'; there are color, count, where"):
        SyntheticVisionDataModule(task="shape")
