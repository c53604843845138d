"""Prompts to model inputs and back into one piece a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rllava_pl.models.encoding import encode, extend, split_images
from rllava_pl.models.policy import Policy
from rllava_pl.types import Message, PromptInputs
from tests.models.conftest import FAMILIES, prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_batch_are_encoded_as_alone(load: Callable[..., Policy], family: str) -> None:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_alone_gives_the_family_of_the_model(load: Callable[..., Policy], family: str) -> None:
    policy, batch = load(family), prompts([1, 2])
    for alone, inputs in zip(encode(policy.processor, batch), policy.encode(batch), strict=True):
        assert {name: x.shape for name, x in alone.images.items()} == {
            name: x.shape for name, x in inputs.images.items()
        }


def test_patches_are_split_by_their_grid() -> None:
    """Two prompts, 1 and 2 images of 2x2, 1x2 and 1x1 patches: 4 rows for the first, 2 + 1 for the second."""
    features = {
        "pixel_values": torch.arange(7.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2], [1, 1, 1]]),
    }
    first, second = split_images(features, [1, 2], "patch")
    assert first["pixel_values"].flatten().tolist() == [0, 1, 2, 3]
    assert second["pixel_values"].flatten().tolist() == [4, 5, 6]
    assert second["image_grid_thw"].tolist() == [[1, 1, 2], [1, 1, 1]]


def test_padding_is_on_the_left_and_does_not_shift_positions(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    inputs = policy.encode(prompts([0, 2]))
    batch = policy.collate(inputs)
    pads = len(inputs[1]) - len(inputs[0])
    assert pads > 0
    assert batch["attention_mask"][0].tolist() == [0] * pads + [1] * len(inputs[0])
    assert batch["position_ids"][0].tolist() == [0] * pads + list(range(len(inputs[0])))


def test_unequal_number_of_slots_and_images_is_refused(load: Callable[..., Policy]) -> None:
    (prompt,) = prompts([2])
    broken = dataclasses.replace(prompt, images=prompt.images[:1], source="train.jsonl row 7")
    message = r"prompt 'test:0' \(train.jsonl row 7\) shows 2 image slot\(s\) but carries 1 image\(s\)"
    with pytest.raises(ValueError, match=message):
        load("idefics3").encode([broken])


def test_lone_surrogate_is_refused_with_its_row(load: Callable[..., Policy]) -> None:
    broken = dataclasses.replace(prompts([0])[0], messages=(Message("user", ("half \ud83d",)),), source="a.jsonl row 7")
    with pytest.raises(ValueError, match=r"prompt 'test:0' \(a.jsonl row 7\) has a lone surrogate in its text"):
        load("idefics3").encode([broken])


def test_no_prompts_give_no_inputs(load: Callable[..., Policy]) -> None:
    assert load("idefics3").encode([]) == []


def test_extended_inputs_have_text_behind_the_prompt() -> None:
    pixels = torch.ones(1, 3)
    inputs = PromptInputs(
        torch.tensor([7, 9, 8]), {"mm_token_type_ids": torch.tensor([0, 1, 0])}, {"pixel_values": pixels}
    )
    longer = extend(inputs, [20, 21])
    assert longer.input_ids_S.tolist() == [7, 9, 8, 20, 21] and longer.input_ids_S.dtype == torch.int64
    assert longer.tokens["mm_token_type_ids"].tolist() == [0, 1, 0, 0, 0]
    assert longer.images["pixel_values"] is pixels
    assert len(inputs) == 3 and len(inputs.tokens["mm_token_type_ids"]) == 3
    assert extend(inputs, ()).input_ids_S.tolist() == [7, 9, 8] and extend(inputs, ()).input_ids_S.dtype == torch.int64


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstration_is_encoded_as_its_text_and_the_end_token(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    ids = policy.encode_response("<answer>red</answer>")
    assert ids.dtype == torch.int64
    assert ids[-1] == policy.tokenizer.eos_token_id and policy.tokenizer.eos_token_id in policy.stop_ids
    assert policy.tokenizer.decode(ids[:-1]) == "<answer>red</answer>" == policy.decode(ids)
    assert policy.encode_response("").tolist() == [policy.tokenizer.eos_token_id]


def test_demonstration_gets_no_special_tokens(load: Callable[..., Policy]) -> None:
    """A tokenizer that puts its start token before every text, as Llama's do, must not put it into a response."""
    from tokenizers.processors import TemplateProcessing

    policy = load("idefics3")
    start = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    expected = policy.encode_response("red")
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    assert policy.tokenizer("red")["input_ids"][0] == start
    assert torch.equal(policy.encode_response("red"), expected)


def test_demonstration_ends_with_a_stop_token(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    eos = policy.tokenizer.eos_token_id
    policy.stop_ids = [30, eos]
    assert policy.encode_response("red")[-1] == eos
    policy.stop_ids = [30, 31]  # the tokenizer's end token ends nothing here: it would never stop the engine
    assert policy.encode_response("red")[-1] == 30


@pytest.mark.parametrize(
    ("family", "token"), [("idefics3", "<image>"), ("llava", "<image>"), ("qwen2_vl", "<|image_pad|>")]
)
def test_demonstration_with_a_banned_token_is_refused(load: Callable[..., Policy], family: str, token: str) -> None:
    policy = load(family)
    with pytest.raises(
        ValueError, match=r"the response .* holds the token .* image content and is never sampled"
    ) as banned:
        policy.encode_response(f"It is {token} red")
    assert repr(token) in str(banned.value)
    message = r"holds the token '<\|im_end\|>', which ends a response \(one is appended here\); remove it from the text"
    with pytest.raises(ValueError, match=message):
        policy.encode_response("<answer>red</answer><|im_end|>")
