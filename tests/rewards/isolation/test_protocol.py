"""Requests to a worker process: shared images are sent once, the model's inputs not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from rllava_pl.rewards.isolation import protocol
from rllava_pl.types import PromptInputs, Rollout, Score


def with_images(rollout: Rollout, *images: Image.Image) -> Rollout:
    return dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, images=images))


def received(request: bytes) -> list[Rollout]:
    ((message, payload),) = protocol.FrameReader(1 << 30).feed(request)
    return protocol.read_request(message, payload)[1]


def test_image_of_a_group_is_sent_once_and_arrives_in_every_rollout(rollout):
    shared, other = Image.new("RGB", (256, 128), "red"), Image.new("L", (8, 8), 7)
    sent = [with_images(rollout(), shared) for _ in range(16)] + [with_images(rollout(), other, shared)]
    request = protocol.score_request(0, sent, images=True)
    assert len(request) < 2 * 3 * 256 * 128
    rollouts = received(request)
    assert [len(r.prompt.images) for r in rollouts] == [1] * 16 + [2]
    for image in (rollouts[0].prompt.images[0], rollouts[-1].prompt.images[1]):
        assert image.tobytes() == shared.tobytes()
    assert rollouts[-1].prompt.images[0].getpixel((0, 0)) == (7, 7, 7)
    assert [r.response_ids.tolist() for r in rollouts] == [rollout().response_ids.tolist()] * 17


def test_pixels_of_the_model_inputs_are_not_sent(rollout):
    inputs = PromptInputs(torch.tensor([1, 2, 3]), images={"pixel_values": torch.zeros(1000, 1000)})
    request = protocol.score_request(0, [dataclasses.replace(rollout(), inputs=inputs)], images=True)
    assert len(request) < 10_000
    (arrived,) = received(request)
    assert arrived.inputs.input_ids_S.tolist() == [1, 2, 3] and not arrived.inputs.images


def test_request_with_too_many_images_is_refused(rollout, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_REQUEST_BYTES", 1 << 20)
    with pytest.raises(protocol.ProtocolError, match="1 rollouts have more than 1 MiB of images"):
        protocol.score_request(0, [with_images(rollout(), Image.new("RGB", (1024, 512)))], images=True)


@pytest.mark.parametrize(
    "row",
    [
        1.0,
        [1.0],
        ["1.0", {}, "", "", []],
        [float("nan"), {}, "", "", []],
        [1e39, {}, "", "", []],
        [1.0, {"iou": "high"}, "", "", []],
        [1.0, {"iou": float("inf")}, "", "", []],
        [None, {}, 1, "", []],
    ],
)
def test_invalid_score_of_a_worker_is_refused(row):
    with pytest.raises(protocol.ProtocolError, match="something else than a score"):
        protocol.read_scores([row], 1)


def test_answer_with_another_number_of_scores_is_refused():
    with pytest.raises(protocol.ProtocolError, match="not a list of 2 scores"):
        protocol.read_scores([None], 2)


def test_scores_of_all_outcomes_arrive_as_they_were():
    scores = [
        Score(0.5, {"iou": 1.0}, flags=("odd",)),
        Score(None, reason="no_box", detail="x"),
        Score.not_applicable(),
    ]
    ((message, _),) = protocol.FrameReader(1 << 20).feed(protocol.score_answer(scores))
    assert protocol.read_scores(message, 3) == scores


@pytest.mark.parametrize(
    ("data", "message"), [(b"\xff" * 64, "at most 1024 are accepted"), (b"\0\0\0\1\0\0\0\0{", "does not hold JSON")]
)
def test_bytes_that_are_not_a_frame_are_refused(data, message):
    with pytest.raises(protocol.ProtocolError, match=message):
        list(protocol.FrameReader(1024).feed(data))
