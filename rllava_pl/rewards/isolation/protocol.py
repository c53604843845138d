"""Messages between the trainer and its worker processes: JSON and the bytes of tensors, never pickle.

A frame is two lengths, a JSON text, and the bytes of the tensors that the text refers to::

    | length of the JSON, 4 bytes | length of the payload, 4 bytes | JSON | payload |
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rllava_pl.checkpoint.codec import decode, encode
from rllava_pl.rewards.scoring import MAX_DETAIL, finite_float
from rllava_pl.types import Json, PromptInputs, Rollout, Score

MAX_REQUEST_BYTES = 512 * 1024 * 1024
"""Of one frame to a worker: a few rollouts, with their images if the reward needs them."""
MAX_ANSWER_BYTES = 64 * 1024
"""Of one score on its way back; the process that sends it is not trusted."""

_LENGTHS = struct.Struct("!II")
_ALIGNMENT_BYTES = 8


class ProtocolError(RuntimeError):
    """Bytes that are not a frame, a frame above the limit, or a message of another form."""


def frame(message: Json, payload: bytes = b"") -> bytes:
    """Bytes of one message."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(payload)) + text + payload


class FrameReader:
    """Cuts a stream of bytes into frames of at most ``limit_bytes``."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Json, bytearray]]:
        """Message and payload of each frame that is complete with these bytes; raises ``ProtocolError``."""
        self._bytes += data
        while len(self._bytes) >= _LENGTHS.size:
            text_bytes, payload_bytes = _LENGTHS.unpack_from(self._bytes)
            start, stop = _LENGTHS.size + text_bytes, _LENGTHS.size + text_bytes + payload_bytes
            if stop > self.limit_bytes:
                raise ProtocolError(f"a frame has {stop} bytes; at most {self.limit_bytes} are accepted")
            if len(self._bytes) < stop:
                return
            text, payload = self._bytes[_LENGTHS.size : start], self._bytes[start:stop]
            del self._bytes[:stop]
            try:
                message = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"a frame does not hold JSON: {error}") from None
            yield message, payload


def read_frames(connection: socket.socket) -> Iterator[tuple[Json, bytearray]]:
    """Every frame until the other side closes the connection."""
    reader = FrameReader(MAX_REQUEST_BYTES)
    while data := connection.recv(1 << 20):
        yield from reader.feed(data)


def score_request(reward: int, rollouts: Sequence[Rollout], *, images: bool) -> bytes:
    """The frame that asks to score rollouts with the reward of this number.

    Of the model's inputs only token ids are sent. Images are sent once, whatever number of rollouts shares them.
    Raises ``ProtocolError`` above ``MAX_REQUEST_BYTES``.
    """
    prompts = {id(r.prompt): r.prompt if images else replace(r.prompt, images=()) for r in rollouts}
    inputs = {id(r.inputs): PromptInputs(r.inputs.input_ids_S) for r in rollouts}
    sent = []
    for r in rollouts:
        segments = r.segments if images else tuple(replace(segment, images=()) for segment in r.segments)
        sent.append(replace(r, prompt=prompts[id(r.prompt)], inputs=inputs[id(r.inputs)], segments=segments))
    encoded = encode(sent)
    payload = b"".join(map(_padded_bytes, encoded["tensors"]))
    if len(payload) > MAX_REQUEST_BYTES:
        raise ProtocolError(
            f"{len(rollouts)} rollouts have more than {MAX_REQUEST_BYTES >> 20} MiB of images, the most of one call; "
            "override score, which takes rollouts one by one, or lower data.resize_above_pixels"
        )
    tensors: list[Json] = [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in encoded["tensors"]]
    rows: Json = {"objects": encoded["objects"], "value": encoded["value"]}
    return frame({"reward": reward, "images": images, "tensors": tensors, "rollouts": rows}, payload)


def read_request(message: Json, payload: bytearray) -> tuple[int, list[Rollout]]:
    """Number of the reward, and the rollouts."""
    body = cast("dict[str, Json]", message)
    number = cast(int, body["reward"])
    data = torch.frombuffer(payload, dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    tensors, start = [], 0
    for name, shape in cast("list[tuple[str, list[int]]]", body["tensors"]):
        dtype: torch.dtype = getattr(torch, name)
        stop = start + dtype.itemsize * torch.Size(shape).numel()
        tensors.append(data[start:stop].view(dtype).view(shape))
        start = stop + -stop % _ALIGNMENT_BYTES
    rollouts = cast("list[Rollout]", decode(cast("dict[str, Json]", body["rollouts"]) | {"tensors": tensors}))
    return number, rollouts if body["images"] else [_withhold_images(rollout) for rollout in rollouts]


def _padded_bytes(x: Tensor) -> bytes:
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return data + bytes(-len(data) % _ALIGNMENT_BYTES)


def _withhold_images(rollout: Rollout) -> Rollout:
    """The rollout with ``WithheldImages`` wherever images may have been."""
    prompt, images = rollout.prompt, WithheldImages()
    if any(message.image_slots for message in prompt.messages):
        prompt = replace(prompt, images=images)
    segments = (replace(s, images=images) if s.origin == "observation" else s for s in rollout.segments)
    return replace(rollout, prompt=prompt, segments=tuple(segments))


class WithheldImages(tuple):  # type: ignore[type-arg]
    """Stands for images that were not sent; reading it raises, so that it is not taken for a prompt without images."""

    __slots__ = ()

    def _refuse(self, *_: object) -> object:
        raise RuntimeError("images are not sent to the reward's process unless its class sets needs_images = True")

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _refuse  # type: ignore[assignment]


def score_answer(scores: Sequence[Score]) -> bytes:
    """The frame with the scores of one call; a score that does not apply is ``null``."""
    rows: list[Json] = [
        [s.value, dict(s.components), s.reason, s.detail, list(s.flags)] if s.applicable else None for s in scores
    ]
    answer = frame(rows)
    if len(answer) <= MAX_ANSWER_BYTES * len(scores):
        return answer
    return frame([[None, {}, "bad_type", "the score is too large to send", []]] * len(scores))


def read_scores(message: Json, number_of_scores: int) -> list[Score]:
    """The scores in a worker's answer, every field checked; raises ``ProtocolError``."""
    if not isinstance(message, list) or len(message) != number_of_scores:
        raise ProtocolError(f"the answer is not a list of {number_of_scores} scores")
    return [_score(row) for row in message]


def _score(row: Json) -> Score:
    match row:
        case None:
            return Score.not_applicable()
        case [None, dict(), str(reason), str(detail), list()]:
            return Score(None, reason=reason, detail=detail[: 2 * MAX_DETAIL])
        case [float() | int() as value, dict(components), str(), str(), list(flags)] if finite_float(value) is not None:
            if all(isinstance(x, float | int) and finite_float(x) is not None for x in components.values()):
                parts = cast("dict[str, float]", components)
                return Score(float(value), parts, flags=tuple(map(str, flags)))
    raise ProtocolError("the answer holds something else than a score")
