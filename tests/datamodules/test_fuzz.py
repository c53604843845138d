"""Thousands of valid and broken rows through the audit: it never crashes, refuses the right ones, and counts all."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from rllava_pl.datamodules import PromptDataModule
from rllava_pl.datamodules.prompts import PromptRows
from tests.datamodules.hostile import MAX_MIB, Case, Maker, write_images


def audited(folder: Path, lines: list[bytes]) -> PromptRows:
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    data = PromptDataModule(train=str(folder / "rows.jsonl"), max_image_mib=MAX_MIB, image_root=str(folder / "images"))
    return data.audit("train")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    return tmp_path


def assert_correct(rows: PromptRows, cases: list[Case]) -> None:
    """Every case is kept, or refused by its code, and the counts add up."""
    codes = {rejection.row: rejection.code for rejection in rows.rejections}
    wrong = [
        (row, case.code or "right", codes.get(row, "accepted"), case.line[:200])
        for row, case in enumerate(cases)
        if codes.get(row, "") != case.code
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} results differ: (row, expected, got, line) {wrong[:5]}"
    assert len(rows) + len(rows.rejections) == rows.total == len(cases)
    repairs = Counter(code for case in cases if not case.code for code in case.repairs)
    assert rows.repairs == repairs, f"results differ in repairs: {rows.repairs}, expected {repairs}"
    for rejection in rows.rejections:
        assert rejection.line == rejection.row + 1 and rejection.field and rejection.message


def assert_sound(rows: PromptRows, sample: int) -> None:
    """Kept rows are safe to use: slots have images, texts and values can be encoded, ids are unique."""
    assert len({rows.sources[0].parse(row).prompt.uid for _, row in rows.audit.kept}) == len(rows)
    for index in random.Random(0).sample(range(len(rows)), min(sample, len(rows))):
        prompt = rows[index]
        assert sum(message.image_slots for message in prompt.messages) == len(prompt.images)
        assert all(image.mode == "RGB" and min(image.size) >= 2 for image in prompt.images)
        texts = [part for message in prompt.messages for part in message.parts if isinstance(part, str)]
        values = (prompt.uid, prompt.answer, prompt.target, *texts, prompt.metadata)
        for text in (*leaves(values), *prompt.metadata):
            assert text.encode().decode() == text and "\0" not in text
        assert json.loads(json.dumps(prompt.metadata)) == prompt.metadata
        assert prompt.answer_text.strip() and any(text.strip() for text in texts)
        assert not any(control in text for text in texts for control in "\x07\r\x9b\x1b")


def leaves(value: object) -> Iterator[str]:
    """All texts in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_valid_rows_are_kept_and_broken_ones_refused_by_their_code(folder, count):
    maker = Maker(seed=count)
    cases = [maker.draw() for _ in range(count)]
    assert 0.6 * count < sum(not case.code for case in cases) < 0.8 * count
    rows = audited(folder, [case.line for case in cases])
    assert {rejection.code for rejection in rows.rejections} == {case.code for case in cases if case.code}
    assert_correct(rows, cases)
    assert_sound(rows, sample=count // 10)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_damaged_lines_are_refused_or_safe_to_use(folder, count):
    """Random bytes of valid rows are replaced; such a row may or may not be valid afterwards."""
    maker, rng, lines = Maker(seed=1), random.Random(1), []
    for _ in range(count):
        line = bytearray(maker.right().line)
        for _ in range(rng.choice((1, 2, 8))):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]",:\\u0019dn<\x00\x80\xff')
        lines.append(bytes(line).replace(b"\n", b" "))
    rows = audited(folder, lines)
    assert len(rows) + len(rows.rejections) == rows.total == count
    assert not [rejection for rejection in rows.rejections if rejection.code == "E00"]
    assert_sound(rows, sample=count)
