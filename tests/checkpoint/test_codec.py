"""Experience survives a checkpoint, pictures included, shared parts once, and nothing but known kinds comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rllava_pl.checkpoint.codec import KIND, Archive
from rllava_pl.types import Turn
from tests.modules.cases import experience, prompt, rollout


def through_file(value: object, path: Path) -> object:
    torch.save(Archive().pack(value), path)
    return Archive().unpack(torch.load(path, weights_only=True))


def test_an_experience_comes_back_as_it_was(tmp_path: Path) -> None:
    before = experience([[1.0, 0.0], [0.0, 0.0]], tokens=[2, 3, 1, 4])
    after = through_file(before, tmp_path / "x.pt")
    assert type(after) is type(before) and len(after) == 4 and after.group_size == 2
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new) and old.dtype == new.dtype, field.name
    assert torch.equal(before.components["accuracy"], after.components["accuracy"])
    assert after.old_logp_NT is None
    for old, new in zip(before.rollouts, after.rollouts, strict=True):
        assert (old.text, old.finish_reason, old.group, old.turns) == (
            new.text,
            new.finish_reason,
            new.group,
            new.turns,
        )
        assert torch.equal(old.response_ids, new.response_ids)
        assert new.prompt.messages == old.prompt.messages
        (old_image,), (new_image,) = old.prompt.images, new.prompt.images
        assert new_image.mode == "RGB" and np.array_equal(np.array(old_image), np.array(new_image))
        assert torch.equal(old.inputs.images["pixels"], new.inputs.images["pixels"])


def test_what_is_shared_stays_shared_and_is_stored_once(tmp_path: Path) -> None:
    one = experience([[1.0, 0.0]])
    many = experience([[float(g % 2) for g in range(16)]])
    after = through_file(many, tmp_path / "many.pt")
    assert len({id(r.prompt) for r in after.rollouts}) == 1
    assert len({id(image) for r in after.rollouts for image in r.prompt.images}) == 1
    packed = Archive().pack(many)
    prompts = [item["prompt"] for item in packed["rollouts"]["items"]]
    assert all(p is prompts[0] for p in prompts)
    assert Archive().pack(one)["rollouts"]["items"][0]["inputs"] is not None


@pytest.mark.parametrize("key", ["row", KIND, "entries", "__class__"])
def test_columns_of_the_data_may_have_any_name(tmp_path: Path, key: str) -> None:
    row = prompt(metadata={key: "Experience"})
    assert through_file(row, tmp_path / "x.pt").metadata == {key: "Experience"}


def test_tuples_and_lists_keep_their_type(tmp_path: Path) -> None:
    turns = (Turn(0, 2), Turn(3, 4))
    after = through_file(dataclasses.replace(rollout(prompt(), 0), turns=turns), tmp_path / "x.pt")
    assert after.turns == turns
    assert through_file([1, (2.5, None), "a", True], tmp_path / "y.pt") == [1, (2.5, None), "a", True]


@pytest.mark.parametrize("kind", ["os.system", "Path", "type", "None", "GRPO"])
def test_unknown_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"the checkpoint holds '{kind}', which this version does not know"):
        Archive().unpack({KIND: kind, "path": "/"})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Path("x"), 1j])
def test_what_is_no_plain_data_is_not_stored(value: object) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be stored in a checkpoint"):
        Archive().pack([value])


def test_a_class_of_the_same_name_is_not_mistaken() -> None:
    class Prompt:
        uid = "p"

    with pytest.raises(TypeError, match="Prompt cannot be stored"):
        Archive().pack(Prompt())
