"""The codec: values come back as they were, shared ones stay shared, and unknown kinds are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rllava_pl.checkpoint.codec import CLASSES, KIND, decode, encode
from rllava_pl.types import (
    IMAGE,
    Markup,
    Message,
    Prompt,
    PromptInputs,
    RewardedBatch,
    Rollout,
    ScoredBatch,
    Segment,
    TrainingBatch,
)


def prompt(uid: str = "p", **options: object) -> Prompt:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    messages = (Message("user", (IMAGE, "Which ", Markup("<|box|>"), "?")),)
    return Prompt(uid, messages, images=(Image.fromarray(pixels),), **options)


def rollout(of: Prompt, inputs: PromptInputs) -> Rollout:
    sampled = Segment(torch.tensor([4, 5]), logprobs_T=torch.tensor([-0.5, -0.25]), weight_version=7)
    given = Segment(torch.tensor([9]), "given")
    return Rollout(of, 3, inputs, (given, sampled), "length", "a b", step_rewards=(0.5,), trained=False)


def batch(group_size: int = 2) -> RewardedBatch:
    """One prompt, ``group_size`` rows of three tokens."""
    of, inputs = prompt(), PromptInputs(torch.arange(4), {"types": torch.ones(4)}, {"pixels": torch.rand(2, 3)})
    NT, N = (group_size, 3), group_size
    return RewardedBatch(
        rollouts=tuple(rollout(of, inputs) for _ in range(group_size)),
        inputs=(inputs,),
        group_size=group_size,
        group_N=torch.zeros(N, dtype=torch.int64),
        in_baseline_N=torch.ones(N, dtype=torch.bool),
        response_ids_NT=torch.ones(NT, dtype=torch.int64),
        sampled_mask_NT=torch.tensor([[False, True, True]] * N),
        trained_mask_NT=torch.ones(NT, dtype=torch.bool),
        engine_logp_NT=torch.randn(NT),
        scores_N=torch.arange(N).float(),
        components={"accuracy": torch.arange(N).float()},
        computed={"old_logp_NT": torch.randn(NT)},
        rewards_N=torch.full((N,), float("nan")),
        token_rewards_NT=torch.randn(NT),
    )


def through_file(value: object, path: Path) -> object:
    torch.save(encode(value), path)
    return decode(torch.load(path, weights_only=True))


def through_json(value: object) -> object:
    """As a message to another process: JSON, and the tensors beside it."""
    encoded = encode(value)
    text = json.dumps({"objects": encoded["objects"], "value": encoded["value"]})
    return decode(json.loads(text) | {"tensors": [x.clone() for x in encoded["tensors"]]})


def assert_same(a: object, b: object) -> None:
    """Equal in value and in type, down to the last field."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    elif isinstance(a, Image.Image):
        assert np.array_equal(np.array(a), np.array(b))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


@pytest.mark.parametrize("way", ["file", "json"])
def test_batch_of_every_stage_comes_back_equal(tmp_path: Path, way: str) -> None:
    rewarded = batch()
    scored = ScoredBatch(**{f.name: getattr(rewarded, f.name) for f in dataclasses.fields(ScoredBatch)})
    training = rewarded.to_stage(TrainingBatch, advantages_NT=torch.randn(2, 3))
    for before in (scored, rewarded, training):
        after = through_file(before, tmp_path / "x.pt") if way == "file" else through_json(before)
        assert_same(before, after)


@pytest.mark.parametrize("way", ["file", "json"])
def test_shared_values_are_stored_once_and_shared_again(tmp_path: Path, way: str) -> None:
    many = batch(16)
    encoded = encode(many)
    assert sum(entry[KIND] == "Prompt" for entry in encoded["objects"]) == 1
    assert sum(entry[KIND] == "Image" for entry in encoded["objects"]) == 1
    after = through_file(many, tmp_path / "x.pt") if way == "file" else through_json(many)
    assert len({id(r.prompt) for r in after.rollouts}) == 1
    assert len({id(image) for r in after.rollouts for image in r.prompt.images}) == 1
    assert all(r.inputs is after.inputs[0] for r in after.rollouts)


@pytest.mark.parametrize("key", ["row", KIND, "entries", "fields", "__class__"])
def test_column_of_any_name_is_data(tmp_path: Path, key: str) -> None:
    assert through_file(prompt(metadata={key: "Rollout"}), tmp_path / "x.pt").metadata == {key: "Rollout"}


@pytest.mark.parametrize(
    "value", [None, True, 3, -0.5, "4", "", [1, 2], [], {"x": [1, None], "y": {"kind": "tuple"}}, [[0.1], {}]]
)
def test_json_value_of_an_answer_keeps_its_type(value: object) -> None:
    assert_same(value, through_json(prompt(answer=value, metadata={"same": value})).answer)


def test_lists_tuples_and_markup_keep_their_type(tmp_path: Path) -> None:
    value = [1, (2.5, None), "a", True, (), [()], Markup("<x>"), {"a": (1,)}]
    assert_same(value, through_file(value, tmp_path / "x.pt"))


def test_numbers_of_numpy_become_plain_ones(tmp_path: Path) -> None:
    after = through_file([np.float64(0.5), np.str_("a")], tmp_path / "x.pt")
    assert_same(after, [0.5, "a"])


@pytest.mark.parametrize("kind", ["os.system", "Path", "type", "None", "GRPO", "Generation"])
def test_unknown_kind_is_refused(kind: str) -> None:
    assert kind not in CLASSES
    with pytest.raises(ValueError, match=f"the encoded value holds '{kind}', which this version does not support"):
        decode({"tensors": [], "objects": [], "value": {KIND: kind, "fields": {"path": "/"}}})


@pytest.mark.parametrize(
    "value",
    [
        {KIND: "object", "index": 0},
        {KIND: "tensor", "index": 5},
        {KIND: "Prompt", "fields": {"unheard_of": 1}},
        {KIND: "Prompt", "uid": "p"},
        {KIND: "tuple"},
        {"uid": "p"},
    ],
)
def test_malformed_value_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="no encoded value of this version"):
        decode({"tensors": [], "objects": [], "value": value})


@pytest.mark.parametrize("value", [3, None, {}, {"value": 1}, [1]])
def test_plain_data_of_another_origin_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="no encoded value of this version"):
        decode(value)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Path("x"), 1j])
def test_value_that_is_no_plain_data_is_not_encoded(value: object) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be stored in a checkpoint"):
        encode([value])


def test_class_with_the_name_of_a_known_one_is_not_encoded() -> None:
    @dataclasses.dataclass
    class Prompt:
        uid: str = "p"

    with pytest.raises(TypeError, match="Prompt cannot be stored"):
        encode(Prompt())
