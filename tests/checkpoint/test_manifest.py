"""What manifests detect: edited, incomplete and unreadable checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import committed_directory


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("files"),
        lambda body: body.update(files=[]),
        lambda body: body.update(files={"archive": 3}),
        lambda body: body.update(saved_at_ns="tomorrow"),
        lambda body: body.update(saved_at_ns=None),
    ],
)
def test_manifest_with_a_right_hash_and_a_wrong_field_is_damage(change) -> None:
    body = json.loads(manifest.Manifest({"archive": manifest.Content(1, "")}).dumps())
    body.pop("sha256")
    change(body)
    text = json.dumps({"sha256": manifest._digest_of_body(body)} | body)
    with pytest.raises(manifest.DamagedCheckpoint, match="a field of its manifest is missing or wrong"):
        manifest.Manifest.loads(text)


def test_manifest_nested_without_end_is_damage() -> None:
    with pytest.raises(manifest.DamagedCheckpoint, match="cannot be read"):
        manifest.Manifest.loads("[" * 60_000)


def test_edited_manifest_is_damage() -> None:
    text = manifest.Manifest({}, rollouts=3).dumps()
    assert manifest.Manifest.loads(text).rollouts == 3
    with pytest.raises(manifest.DamagedCheckpoint, match="was changed"):
        manifest.Manifest.loads(text.replace('"rollouts": 3', '"rollouts": 4'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "0.bin").write_bytes(b"abd"), r"0\.bin was changed"),
        (lambda d: (d / "0.bin").write_bytes(b"ab"), r"0\.bin has 2 bytes, the manifest says 3"),
        (lambda d: (d / "0.bin").unlink(), r"0\.bin has None bytes, the manifest says 3"),
        (lambda d: (d / "1.bin").write_bytes(b"abc"), r"1\.bin has 3 bytes, the manifest says None"),
        (lambda d: (d / "manifest.json").unlink(), "it has no manifest"),
        (lambda d: (d / "manifest.json").write_text("{}"), "its manifest cannot be read"),
    ],
)
def test_damaged_directory_is_detected(tmp_path: Path, damage, message: str) -> None:
    with committed_directory(tmp_path / "a.ckpt") as temporary:
        (temporary / "0.bin").write_bytes(b"abc")
    damage(tmp_path / "a.ckpt")
    with pytest.raises(manifest.DamagedCheckpoint, match=message):
        manifest.check(tmp_path / "a.ckpt")
