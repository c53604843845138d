"""Rollouts and scores as bytes, for the way to a reward's process and back: JSON and raw numbers, never pickle.

A frame is two lengths, a JSON text, and the bytes of the tensors and pictures that the text tells of::

    | length of JSON, 4 bytes | length of the rest, 4 bytes | JSON | rest |
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor

from rllava_pl.rewards.scoring import MAX_DETAIL, finite_float as number
from rllava_pl.types import IMAGE, ImageSlot, Message, Prompt, PromptInputs, Rollout, Score, Segment

if TYPE_CHECKING:
    from PIL.Image import Image

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAX_REQUEST_BYTES = 512 * 1024 * 1024
"""Of one frame to a worker: a few rollouts, with their pictures if the reward wants them."""
MAX_ANSWER_BYTES = 64 * 1024
"""Of one score on its way back; the process that sends it is not trusted."""

_LENGTHS = struct.Struct("!II")
_TENSORS = {
    "prompt_ids": torch.int64,
    "response_ids": torch.int64,
    "engine_logprobs": torch.float32,
    "response_mask": torch.bool,
    "demo_mask": torch.bool,
}


class WireError(RuntimeError):
    """Bytes that are no frame, or a frame beyond the limit."""


def frame(message: Json, rest: bytes = b"") -> bytes:
    """Bytes of one message."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(rest)) + text + rest


class Reader:
    """Cuts a stream of bytes into frames.

    Args:
        limit_bytes: Largest frame.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[Json, bytes]]:
        """The frames that are complete with these bytes.

        Raises:
            WireError: They cannot be one.
        """
        self._bytes += piece
        while len(self._bytes) >= _LENGTHS.size:
            text, rest = _LENGTHS.unpack_from(self._bytes)
            stop = _LENGTHS.size + text + rest
            if stop > self.limit_bytes:
                raise WireError(f"a frame of {stop} bytes; at most {self.limit_bytes} are taken")
            if len(self._bytes) < stop:
                return
            with memoryview(self._bytes) as view:
                head, tail = bytes(view[_LENGTHS.size : stop - rest]), bytes(view[stop - rest : stop])
            del self._bytes[:stop]
            try:
                message = json.loads(head)
            except (ValueError, RecursionError) as error:
                raise WireError(f"a frame that is no JSON: {error}") from None
            yield message, tail


def frames(connection: socket.socket, limit_bytes: int = MAX_REQUEST_BYTES) -> Iterator[tuple[Json, bytes]]:
    """Every frame until the other side hangs up."""
    reader = Reader(limit_bytes)
    while piece := connection.recv(1 << 20):
        yield from reader.feed(piece)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def rollout_request(reward: int, rollouts: Sequence[Rollout], *, images: bool) -> bytes:
    """The frame that asks to score rollouts with the reward of this number; a picture that several have goes once.

    Raises:
        WireError: More than ``MAX_REQUEST_BYTES``.
    """
    pictures = {id(image): image for rollout in rollouts for image in rollout.prompt.images} if images else {}
    places = {key: place for place, key in enumerate(pictures)}
    rest = bytearray()
    for image in pictures.values():
        rest += image.convert("RGB").tobytes()
        if len(rest) > MAX_REQUEST_BYTES:
            raise WireError(
                f"{len(rollouts)} rollouts have more than {MAX_REQUEST_BYTES >> 20} MiB of pictures, the most "
                "of one call; override score, which takes rollouts one by one, or lower data.resize_above_pixels"
            )
    sizes: list[Json] = [list(image.size) for image in pictures.values()]
    rows: list[Json] = [_encoded(rollout, rest, places if images else None) for rollout in rollouts]
    return frame({"reward": reward, "pictures": sizes, "rollouts": rows}, bytes(rest))


def read_request(message: Json, rest: bytes) -> tuple[int, list[Rollout]]:
    """Number of the reward, and the rollouts as they were, but for the model's inputs, of which the ids alone come."""
    body = cast("dict[str, Json]", message)
    view, rollouts = memoryview(rest), []
    sizes = cast("list[list[int]]", body["pictures"])
    pictures = list(_images(sizes, view))
    start = sum(3 * width * height for width, height in sizes)
    for row in cast("list[dict[str, Json]]", body["rollouts"]):
        size = cast(int, row["bytes"])
        rollouts.append(_decoded(row, view[start : start + size], pictures))
        start += size
    return cast(int, body["reward"]), rollouts


def _encoded(rollout: Rollout, rest: bytearray, places: Mapping[int, int] | None) -> dict[str, Json]:
    """``places``: of each picture by its id; None: pictures stay here."""
    start, lengths = len(rest), {}
    for name, dtype in _TENSORS.items():
        x: Tensor | None = getattr(rollout, name)
        if x is not None:
            lengths[name] = len(x)
            rest += x.detach().to("cpu", dtype).numpy().tobytes()
    prompt = rollout.prompt
    return {
        "prompt": {
            "uid": prompt.uid,
            "messages": [
                [m.role, *(None if isinstance(p, ImageSlot) else p for p in m.parts)] for m in prompt.messages
            ],
            "answer": prompt.answer,
            "target": prompt.target,
            "rejected": prompt.rejected,
            "metadata": dict(prompt.metadata),
            "source": prompt.source,
        },
        "pictures": [] if places is None else [places[id(image)] for image in prompt.images],
        "withheld": len(prompt.images) if places is None else 0,
        "lengths": cast(Json, lengths),
        "bytes": len(rest) - start,
        "group": rollout.group,
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "text": rollout.text,
        "turns": [[turn.start, turn.stop] for turn in rollout.turns],
    }


def _decoded(row: dict, rest: memoryview, pictures: Sequence[Image]) -> Rollout:  # type: ignore[type-arg]
    tensors, start = {}, 0
    for name, length in row["lengths"].items():
        dtype = _TENSORS[name]
        stop = start + length * dtype.itemsize
        whole = bytearray(rest[start:stop])  # a copy: torch wants memory that may be written
        tensors[name] = torch.frombuffer(whole, dtype=dtype) if whole else torch.empty(0, dtype=dtype)
        start = stop
    images: tuple[Image, ...] = Withheld() if row["withheld"] else tuple(pictures[place] for place in row["pictures"])
    prompt = row["prompt"]
    messages = tuple(Message(m[0], tuple(IMAGE if p is None else p for p in m[1:])) for m in prompt.pop("messages"))
    return Rollout(
        prompt=Prompt(messages=messages, images=images, **prompt),
        group=row["group"],
        inputs=PromptInputs(tensors["prompt_ids"]),
        finish_reason=row["finish_reason"],
        weight_version=row["weight_version"],
        text=row["text"],
        turns=tuple(Turn(*turn) for turn in row["turns"]),
        **tensors,
    )


def _images(sizes: list[list[int]], rest: memoryview) -> Iterator[Image]:
    from PIL import Image

    start = 0
    for width, height in sizes:
        stop = start + 3 * width * height
        yield Image.frombytes("RGB", (width, height), bytes(rest[start:stop]))
        start = stop


class Withheld(tuple):  # type: ignore[type-arg]
    """Stands for images that were not sent, and says so instead of looking like a prompt without any."""

    __slots__ = ()

    def _refuse(self, *_: object) -> object:
        raise RuntimeError("images stay in the trainer unless the reward's class says needs_images = True")

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _refuse  # type: ignore[assignment]


# -- scores ------------------------------------------------------------------------------------------------------------


def score_answer(scores: Sequence[Score]) -> bytes:
    """The frame with the scores of one call."""
    rows: list[Json] = [
        [score.value, dict(score.components), score.reason, score.detail, list(score.flags)] for score in scores
    ]
    answer = frame(rows)
    if len(answer) <= MAX_ANSWER_BYTES * len(scores):
        return answer
    return frame([[None, {}, "bad_type", "the score is too large to send", []]] * len(scores))


def read_scores(message: Json, number_of_scores: int) -> list[Score]:
    """What a worker answered; nothing in it is taken on trust.

    Raises:
        WireError: It is no answer to a question of so many samples.
    """
    if not isinstance(message, list) or len(message) != number_of_scores:
        raise WireError(f"an answer that is no list of {number_of_scores} scores")
    return [_score(row) for row in message]


def _score(row: Json) -> Score:
    match row:
        case [None, dict(), str(reason), str(detail), list()]:
            return Score(None, reason=reason, detail=detail[: 2 * MAX_DETAIL])
        case [float() | int() as value, dict(components), str(), str(), list(flags)] if number(value) is not None:
            parts = {name: x for name, x in components.items() if isinstance(x, float | int) and number(x) is not None}
            if len(parts) == len(components):
                return Score(float(value), parts, flags=tuple(map(str, flags)))
    raise WireError("an answer that is no score")
