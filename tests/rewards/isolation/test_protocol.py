"""What is sent to a reward's process: pictures that rollouts share go once."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from rllava_pl.rewards.isolation import protocol as wire


def sent(rollouts) -> bytes:
    return wire.rollout_request(0, rollouts, images=True)


def test_the_picture_of_a_group_is_sent_once_and_arrives_at_each(rollout):
    shared, other = Image.new("RGB", (256, 128), "red"), Image.new("L", (8, 8), 7)
    with_shared = dataclasses.replace(rollout(), prompt=dataclasses.replace(rollout().prompt, images=(shared,)))
    with_both = dataclasses.replace(rollout(), prompt=dataclasses.replace(rollout().prompt, images=(other, shared)))
    content = sent([with_shared] * 16 + [with_both])
    assert len(content) < 2 * 3 * 256 * 128
    ((message, rest),) = wire.Reader(1 << 30).feed(content)
    _, rollouts = wire.read_request(message, rest)
    assert [len(r.prompt.images) for r in rollouts] == [1] * 16 + [2]
    for picture in (rollouts[0].prompt.images[0], rollouts[-1].prompt.images[1]):
        assert picture.tobytes() == shared.tobytes()
    assert rollouts[-1].prompt.images[0].getpixel((0, 0)) == (7, 7, 7)
    assert [r.response_ids.tolist() for r in rollouts] == [rollout().response_ids.tolist()] * 17


def test_too_many_pictures_for_one_call_are_refused_where_they_stand(rollout, monkeypatch):
    monkeypatch.setattr(wire, "MAX_REQUEST_BYTES", 1 << 20)
    large = Image.new("RGB", (1024, 512))
    picture = dataclasses.replace(rollout(), prompt=dataclasses.replace(rollout().prompt, images=(large,)))
    with pytest.raises(wire.WireError, match="1 rollouts have more than 1 MiB of pictures"):
        sent([picture])
