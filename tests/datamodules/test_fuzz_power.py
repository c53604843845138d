"""The fuzzer itself is tested: with any one check taken out, it notices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath

import pytest
from PIL import ImageFile

from rllava_pl.datamodules import audit, images, messages, paths, schema
from rllava_pl.datamodules.images import ImageReader
from rllava_pl.types import Message
from tests.datamodules.hostile import Maker, write_images
from tests.datamodules.test_fuzz import assert_correct, audited

ROWS = 1500


def nothing(*_: object) -> None:
    """Checks nothing."""


MUTANTS: dict[str, tuple[object, str, object]] = {
    "paths may leave the folder": (PurePath, "is_relative_to", lambda *_: True),
    "truncated images are filled up": (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
    "any text": (messages, "check_unicode", nothing),
    "any metadata": (schema, "check_unicode", nothing),
    "control characters stay": (schema, "CONTROLS", re.compile("(?!)")),
    "URLs are paths": (paths, "is_url", lambda _: False),
    "URLs in messages": (messages, "is_url", lambda _: False),
    "ids may repeat": (audit, "_duplicate", lambda s, place, f, uid: audit.UsableRow(f"{uid}'{place}", (), ())),
    "any answer": (schema, "check_answer", nothing),
    "any shape": (images, "LARGEST_ASPECT", 10**9),
    "any side": (images, "SHORTEST_SIDE_PIXELS", 1),
    "any file": (ImageReader, "_check_bytes", nothing),
    "any header": (ImageReader, "_check_header", nothing),
    "slots are not counted": (Message, "image_slots", property(lambda _: 0)),
    "right images are refused": (images, "orientation", lambda _: 1 / 0),
}


@pytest.fixture(scope="module")
def audit_of_cases(tmp_path_factory) -> Callable[[], None]:
    folder = tmp_path_factory.mktemp("power")
    (folder / "images").mkdir()
    write_images(folder / "images")
    maker = Maker(seed=3)
    cases = [maker.draw() for _ in range(ROWS)]

    def check() -> None:
        assert_correct(audited(folder, [case.line for case in cases]), cases)

    check()  # with all checks in place it passes
    return check


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_fuzzing_notices_every_removed_check(audit_of_cases, monkeypatch, name):
    monkeypatch.setattr(*MUTANTS[name])
    with pytest.raises(AssertionError, match="results differ"):
        audit_of_cases()
