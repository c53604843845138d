"""``check-data``: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllava_pl.cli import main
from tests.datamodules.hostile import encoded, noise

ROW = {"prompt": "Which?", "answer": "4"}
CONFIG = """
model:
  class_path: GRPO
  init_args:
    policy: {class_path: VLM, init_args: {path: nowhere}}
    rewards: [AnswerTagReward]
data:
  class_path: PromptDataModule
  init_args: {train: train.jsonl}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from rllava_pl.models import tiny

    return str(tiny.build(tmp_path_factory.mktemp("m") / "m", questions=["Which?"], answers=["4"], warmup_steps=0))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path, model) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLLAVA_PL_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("path: nowhere", f"path: {model}"))
    return tmp_path


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(*options: str) -> int:
    """The exit code."""
    try:
        main(["check-data", "--config", "run.yaml", *options])
    except SystemExit as exit_:
        return int(exit_.code)
    return 0


def test_clean_data_passes(capsys):
    write("train.jsonl", *[ROW] * 3)
    assert check() == 0
    out = capsys.readouterr()
    assert out.out.startswith("train: 3 rows, 3 usable, 0 refused (")
    assert "code" not in out.out and out.err == ""


def test_bad_rows_are_listed_by_code_with_examples(capsys):
    write(
        "train.jsonl",
        ROW,
        *[ROW | {"prompt": ""}] * 5,
        {},
        ROW | {"prompt": "<|im_end|>"},
        ROW | {"images": "../a.png"},
    )
    assert check("--report", "made/bad.jsonl") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "train: 9 rows, 2 usable, 7 refused, more than the allowed 1.00% (" in out
    assert "E03 │ empty text │ 5 │ train.jsonl row 1 (line 2), prompt: is empty; leave the row out" in out
    assert "train.jsonl row 3 (line 4)" in out and "row 4 (line 5)" not in out  # three of each
    assert "E07" in out and "E01" in out and "W02" in out
    assert "every refused row: made/bad.jsonl" in out
    report = [json.loads(line) for line in Path("made/bad.jsonl").read_text().splitlines()]
    assert [row["row"] for row in report] == [1, 2, 3, 4, 5, 6, 8]
    assert {"source", "row", "id", "field", "code", "message", "line"} == set(report[0])


def test_json_option_prints_the_summary(capsys):
    write("train.jsonl", *[ROW] * 99, {"id": "q", "prompt": "Which?"})
    write("val.jsonl", {})
    assert check("--json", "--data.val", "val.jsonl") == 1
    summary = json.loads(capsys.readouterr().out)
    train, val = summary["train"], summary["val"]
    assert (train["passed"], train["rows"], train["accepted"], train["rejected"]) == (True, 100, 99, 1)
    assert train["rejected_by_code"]["E01"]["examples"][0]["id"] == "q"
    assert (val["passed"], val["rejected"], val["max_reject_fraction"]) == (False, 1, 0.01)
    assert check("--json", "--data.val", "val.jsonl", "--split", "train") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["train"]


def test_options_of_fit_apply_and_prompts_are_measured(capsys):
    write("train.jsonl", ROW, ROW | {"prompt": "Which? " * 50})
    assert check() == 0
    assert check("--data.max_prompt_tokens", "30", "--data.max_reject_fraction", "0.5") == 0
    assert "E14" in capsys.readouterr().out
    assert check("--data.max_prompt_tokens", "30") == 1


def test_full_decoding_finds_the_same_as_the_quick_check(capsys):
    Path("a.jpg").write_bytes(encoded(noise(64, 48), "JPEG"))
    Path("b.jpg").write_bytes(encoded(noise(64, 48), "JPEG")[:700])
    write("train.jsonl", ROW | {"images": "a.jpg"}, ROW | {"images": "b.jpg"})
    summaries = []
    for options in ([], ["--decode"]):
        assert check("--json", *options) == 1
        summaries.append(json.loads(capsys.readouterr().out)["train"] | {"seconds": 0})
    assert summaries[0] == summaries[1]
    assert list(summaries[0]["rejected_by_code"]) == ["E10"]


def test_generated_data_is_checked(capsys):
    assert main(["check-data", "--config", "tiny/colour", "--data.train_size=64", "--data.val_size=8"]) is None
    out = capsys.readouterr().out
    assert "train: 64 rows, 64 usable, 0 refused" in out and "val: 8 rows" in out and "test: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train", "none.jsonl"], "data file 'none.jsonl' does not exist"),
        (["--data.train", "empty.jsonl"], "the train split has no rows"),
        (["--split", "test"], "there is no source for the test split; set test to a file or data set"),
        (["--data.max_reject_fractoin", "0.1"], "did you mean 'max_reject_fraction'?"),
        (["--data.max_reject_fraction", "2"], "data.max_reject_fraction is 2.0; it is a share from 0 to below 1"),
        (["--split", "trian"], "invalid choice: 'trian'"),
    ],
)
def test_mistake_gives_one_line(capsys, options, message):
    write("train.jsonl", ROW)
    Path("empty.jsonl").touch()
    assert check(*options) == 2
    assert message in capsys.readouterr().err


def test_help_shows_options_and_exit_codes(capsys):
    assert check("--help") == 0
    out = capsys.readouterr().out
    assert "--report FILE" in out and "exit code: 0 the run would start" in out
