"""Prompts to model inputs and back into one piece a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rllava_pl.models.encoding import split_images
from rllava_pl.models.policy import Policy
from tests.models.conftest import FAMILIES, prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_encodes_like_its_prompts_alone(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    batch = prompts([0, 1, 3, 2])
    for together, prompt in zip(policy.encode(batch), batch, strict=True):
        (alone,) = policy.encode([prompt])
        assert torch.equal(together.input_ids_S, alone.input_ids_S)
        assert together.images.keys() == alone.images.keys()
        for name, tensor in alone.images.items():
            padded = together.images[name][: len(tensor)]
            assert torch.equal(padded, tensor), name
            assert not together.images[name][len(tensor) :].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_equal_image_features(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    config = policy.model.config
    image_token = getattr(config, "image_token_id", None) or config.image_token_index
    for count, inputs in zip([0, 1, 3], policy.encode(prompts([0, 1, 3])), strict=True):
        assert int((inputs.input_ids_S == image_token).sum()) == count * (16 if family == "llava" else 4)
        assert bool(inputs.images) == bool(count)


def test_patches_are_cut_by_their_grid_and_not_by_rows() -> None:
    """Two prompts, 1 and 2 images of 2x2, 1x2 and 1x1 patches: 4 rows for the first, 2 + 1 for the second."""
    features = {
        "pixel_values": torch.arange(7.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2], [1, 1, 1]]),
    }
    first, second = split_images(features, [1, 2], "patch")
    assert first["pixel_values"].flatten().tolist() == [0, 1, 2, 3]
    assert second["pixel_values"].flatten().tolist() == [4, 5, 6]
    assert second["image_grid_thw"].tolist() == [[1, 1, 2], [1, 1, 1]]


def test_padding_is_on_the_left_and_in_no_position(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    inputs = policy.encode(prompts([0, 2]))
    batch = policy.collate(inputs)
    pads = len(inputs[1]) - len(inputs[0])
    assert pads > 0
    assert batch["attention_mask"][0].tolist() == [0] * pads + [1] * len(inputs[0])
    assert batch["position_ids"][0].tolist() == [0] * pads + list(range(len(inputs[0])))


def test_slots_and_images_must_agree(load: Callable[..., Policy]) -> None:
    (prompt,) = prompts([2])
    broken = dataclasses.replace(prompt, images=prompt.images[:1], source="train.jsonl row 7")
    message = r"prompt 'test:0' \(train.jsonl row 7\) shows 2 image slot\(s\) but carries 1 image\(s\)"
    with pytest.raises(ValueError, match=message):
        load("idefics3").encode([broken])


def test_no_prompts_no_inputs(load: Callable[..., Policy]) -> None:
    assert load("idefics3").encode([]) == []
