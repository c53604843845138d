"""The handwritten digits: split, pictures, and what happens without scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from rllava_pl.datamodules import DigitsDataModule
from rllava_pl.datamodules import digits as digits_file

pytest.importorskip("sklearn", reason='the digits come with scikit-learn; pip install "rllava-pl[demo]"')


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    data = DigitsDataModule()
    data.setup("fit")
    return data


def test_splits_are_disjoint_and_complete(data):
    parts = [{prompt.uid for prompt in split} for split in (data.train_prompts, data.val_prompts, data.test_prompts)]
    assert [len(part) for part in parts] == [1205, 192, 400]
    assert set.union(*parts) == {f"digits:{row}" for row in range(1797)}


def test_split_does_not_depend_on_the_seed(data):
    other = DigitsDataModule(seed=1)
    other.setup("test")
    assert [prompt.uid for prompt in other.test_prompts] == [prompt.uid for prompt in data.test_prompts]


def test_rows_agree_with_scikit_learn(data):
    from sklearn.datasets import load_digits

    truth = load_digits()
    for prompt in data.val_prompts[:20]:
        row = int(prompt.uid.removeprefix("digits:"))
        assert prompt.answer == str(truth.target[row])
        assert prompt.images[0].size == (56, 56)
        assert prompt.images[0].mode == "RGB"
        # Block means of a bicubic enlargement follow the original grey levels.
        blocks = np.asarray(prompt.images[0].convert("L")).reshape(8, 7, 8, 7).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), truth.images[row].ravel())[0, 1] > 0.95


def test_question_has_one_slot(data):
    (message,) = data.train_prompts[0].messages
    assert message.image_slots == 1
    assert message.parts[1] == "Which digit is it?"


def test_demonstrations_change_neither_images_nor_order(data):
    shown = DigitsDataModule(demonstrations=0.25)
    shown.setup("fit")
    # 301 of 1,205 on average, standard deviation sqrt(1205 * 3/16) = 15
    assert abs(sum(bool(prompt.target) for prompt in shown.train_prompts) - 301) < 60
    for before, after in zip(data.train_prompts, shown.train_prompts, strict=True):
        assert (before.uid, before.answer, before.target) == (after.uid, after.answer, "")
        assert before.images[0].tobytes() == after.images[0].tobytes()
        if after.target:
            assert after.target == f"<answer>{after.answer}</answer>" != after.rejected


def test_validation_and_test_digits_always_carry_both_responses(data):
    for prompt in (*data.val_prompts, *data.test_prompts):
        assert prompt.target == f"<answer>{prompt.answer}</answer>"
        assert prompt.rejected in {f"<answer>{digit}</answer>" for digit in range(10)} - {prompt.target}


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(digits_file, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rllava-pl\[demo\]"'):
        DigitsDataModule().setup("fit")
