"""Files of every format through the data module, the audit of their rows, and the messages people get to see."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from rllava_pl.datamodules import DataError, PromptDataModule, Rejection
from rllava_pl.types import IMAGE, Message

COLUMNS = {"prompt": "problem", "images": "image", "answer": "solution"}
RED, BLUE = (220, 0, 0), (0, 0, 220)


def png(color: tuple[int, int, int] = RED) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count: int) -> list[object]:
    return [{"prompt": f"Question {k}", "answer": str(k)} for k in range(count)]


@pytest.fixture
def rows(tmp_path) -> list[dict[str, str]]:
    """Two rows with images beside the data file."""
    (tmp_path / "red.png").write_bytes(png(RED))
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    return [
        {"problem": "<image>Which color?", "image": "red.png", "solution": "red", "level": "1"},
        {"problem": "<image>Which color, too?", "image": "blue.png", "solution": "blue", "level": "2"},
    ]


def as_jsonl(folder: Path, rows: list[dict[str, str]]) -> str:
    return jsonl(folder / "train.jsonl", rows)


def as_json(folder: Path, rows: list[dict[str, str]]) -> str:
    (folder / "train.json").write_text(json.dumps(rows))
    return str(folder / "train.json")


def as_csv(folder: Path, rows: list[dict[str, str]]) -> str:
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "train.csv")


def dataset_of(folder: Path, rows: list[dict[str, str]]):
    """As hub data sets are: images inside, as a feature that decodes itself."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    inside = [row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
    text = Value("string")
    features = Features({"problem": text, "image": ImageFeature(), "solution": text, "level": text})
    return Dataset.from_list(inside, features=features)


def as_parquet(folder: Path, rows: list[dict[str, str]]) -> str:
    dataset_of(folder, rows).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def as_arrow(folder: Path, rows: list[dict[str, str]]) -> str:
    dataset_of(folder, rows).save_to_disk(folder / "saved")
    (folder / "train.arrow").write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
    return str(folder / "train.arrow")


def as_folder(folder: Path, rows: list[dict[str, str]]) -> str:
    dataset_of(folder, rows).save_to_disk(folder / "train")
    return str(folder / "train")


def as_folder_of_splits(folder: Path, rows: list[dict[str, str]]) -> str:
    from datasets import DatasetDict

    DatasetDict({"part": dataset_of(folder, rows)}).save_to_disk(folder / "train")
    return f"{folder / 'train'}@part"


WRITERS = [as_jsonl, as_json, as_csv, as_parquet, as_arrow, as_folder, as_folder_of_splits]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Parquet files are unpacked into the cache of ``datasets``; keep that out of the home directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path, rows, write):
    data = PromptDataModule(train=write(tmp_path, rows), columns=COLUMNS, batch_size=2)
    data.setup("fit")
    first, second = data.train_prompts
    assert first.messages == (Message("user", (IMAGE, "Which color?")),)
    assert (first.answer, second.answer) == ("red", "blue")
    assert first.metadata == {"level": "1"}
    assert [p.images[0].getpixel((0, 0)) for p in (first, second)] == [RED, BLUE]
    assert [p.uid for p in (first, second)] in (["train:0", "train:1"], ["train@part:0", "train@part:1"])
    (batch,) = data.train_dataloader()
    assert len(batch) == 2
    assert data.val_dataloader() == []


def test_class_labels_are_named(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"prompt": Value("string"), "answer": ClassLabel(names=["cat", "dog"])})
    Dataset.from_list([{"prompt": "Which?", "answer": 1}], features=features).to_parquet(tmp_path / "a.parquet")
    data = PromptDataModule(test=str(tmp_path / "a.parquet"))
    data.setup("test")
    assert data.test_prompts[0].answer == "dog"


def test_messages_survive_parquet(tmp_path):
    from datasets import Dataset

    chat = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]}]
    row = {"messages": chat, "images": [{"bytes": png(), "path": None}], "answer": "red"}
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    data = PromptDataModule(test=str(tmp_path / "a.parquet"))
    data.setup("predict")
    assert data.test_prompts[0].messages == (Message("user", (IMAGE, "Which?")),)
    assert data.test_prompts[0].images[0].getpixel((0, 0)) == RED


def test_several_sources_are_joined(tmp_path):
    sources = [jsonl(tmp_path / "a.jsonl", texts(2)), jsonl(tmp_path / "b.jsonl", texts(1))]
    data = PromptDataModule(train=sources)
    data.setup("fit")
    assert [prompt.uid for prompt in data.train_prompts] == ["a:0", "a:1", "b:0"]
    assert data.train_prompts[2].source == f"{sources[1]} row 0"
    assert [prompt.uid for prompt in data.train_prompts[1:]] == ["a:1", "b:0"]


def test_image_root_replaces_the_folder_of_the_file(tmp_path, rows):
    (tmp_path / "elsewhere").mkdir()
    source = jsonl(tmp_path / "elsewhere" / "train.jsonl", rows)
    data = PromptDataModule(train=source, columns=COLUMNS, image_root=str(tmp_path))
    data.setup("fit")
    assert len(data.train_prompts) == 2
    with pytest.raises(DataError, match=r"E06 image missing: 2"):
        PromptDataModule(train=source, columns=COLUMNS).setup("fit")


def test_error_names_source_row_field_and_reason(tmp_path):
    (tmp_path / "cut.png").write_bytes(png()[:40])
    bad = [
        {"prompt": "a", "answer": "4", "images": ["cut.png"]},
        {"prompt": "  ", "answer": "4"},
        {"prompt": "a", "answer": "4", "images": ["none.png", "http://a.org/b.png"]},
    ]
    source = jsonl(tmp_path / "train.jsonl", [*texts(2), *bad])
    with pytest.raises(DataError) as caught:
        PromptDataModule(train=source).setup("fit")
    assert [(r.row, r.field, r.code) for r in caught.value.rejections] == [
        (2, "images[0]", "E10"),
        (3, "prompt", "E03"),
        (4, "images[0]", "E06"),
    ]
    message = str(caught.value)
    assert message.startswith("3 of 5 rows cannot be used (E03 empty text: 1, E06 image missing: 1, E10 image cannot")
    assert f"{source} row 3 (line 4), prompt: is empty; leave the row out, or fill it in (E03 empty text)" in message


def test_error_shows_ten_rows_and_the_total(tmp_path):
    source = jsonl(tmp_path / "train.jsonl", [{"prompt": ""}] * 25)
    with pytest.raises(DataError, match=r"25 of 25 rows cannot be used") as caught:
        PromptDataModule(train=source).setup("fit")
    assert str(caught.value).count("jsonl row ") == 10
    assert str(caught.value).endswith("... and 15 more")
    assert len(caught.value.rejections) == 25


def test_broken_lines_are_refused_one_by_one(tmp_path):
    lines = [b'{"prompt": "a", "answer": "1"}', b"", b"{", b'["a"]', b'{"prompt": "\xff"}', b"[" * 100_000]
    (tmp_path / "train.jsonl").write_bytes(b"\r\n".join(lines))
    rows = PromptDataModule(train=str(tmp_path / "train.jsonl")).audit("train")
    assert [(r.row, r.field, r.code) for r in rows.rejections] == [
        (1, "line", "E02"),
        (2, "row", "E02"),
        (3, "line", "E04"),
        (4, "line", "E02"),
    ]
    assert len(rows) + len(rows.rejections) == rows.total == 5


def test_e15_duplicate_id_names_the_first_row(tmp_path):
    source = jsonl(tmp_path / "train.jsonl", [row | {"id": "same"} for row in texts(2)])
    (rejection,) = PromptDataModule(train=source).audit("train").rejections
    message = f"'same' is already the id of {source} row 0; ids must be unique in a split"
    assert rejection == Rejection(source, 1, "id", "E15", message, "same", 2)


def test_allowed_share_of_bad_rows_is_left_out_with_one_warning(tmp_path):
    source = jsonl(tmp_path / "train.jsonl", [*texts(8), {"prompt": ""}, {"prompt": "a"}])
    data = PromptDataModule(train=source, max_reject_fraction=0.2)
    with pytest.warns(UserWarning, match=r"train: left out 2 of 10 rows \(E01 missing field: 1, E03 empty text: 1\)"):
        data.setup("fit")
    assert [prompt.answer for prompt in data.train_prompts] == [str(k) for k in range(8)]
    with pytest.raises(DataError):
        PromptDataModule(train=source, max_reject_fraction=0.19).setup("fit")


def test_added_slots_are_counted(tmp_path, rows):
    rows[0]["problem"] = "Which color?"
    audit = PromptDataModule(train=as_jsonl(tmp_path, rows), columns=COLUMNS).audit("train")
    assert (audit.repairs["W01"], len(audit)) == (1, 2)
    assert audit[0].messages[0].parts == (IMAGE, "Which color?")


def responses(path: Path, write: str) -> str:
    """Three rows, the last one without a pair, as JSON lines, CSV or Parquet."""
    table: list[dict[str, object]] = [
        {"prompt": f"Question {k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(2)
    ]
    if write == "jsonl":
        return jsonl(path / "a.jsonl", [*table, {"prompt": "Question 2"}])
    if write == "csv":
        lines = ["prompt,chosen,rejected", *(",".join(map(str, row.values())) for row in table), "Question 2,,"]
        (path / "a.csv").write_text("\n".join(lines))
        return str(path / "a.csv")
    from datasets import Dataset

    chats = [row | {n: [{"role": "assistant", "content": row[n]}] for n in ("chosen", "rejected")} for row in table]
    chats.append({"prompt": "Question 2", "chosen": None, "rejected": []})
    Dataset.from_list(chats).to_parquet(path / "a.parquet")
    return str(path / "a.parquet")


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
def test_targets_and_pairs_reach_the_prompts(tmp_path, write):
    options = {"train": responses(tmp_path, write), "columns": {"target": "chosen"}, "require_answer": False}
    data = PromptDataModule(**options)
    data.setup("fit")
    assert [(p.target, p.rejected) for p in data.train_prompts] == [("good 0", "bad 0"), ("good 1", "bad 1"), ("", "")]
    assert data.train_prompts[0].metadata == {}
    assert data.train_prompts.filled == {"target": 2, "rejected": 2}
    for required, field in (("require_target", "chosen"), ("require_rejected", "rejected")):
        audit = PromptDataModule(**options, **{required: True}).audit("train")
        assert [(r.row, r.field, r.code) for r in audit.rejections] == [(2, field, "E01")]


def test_mapped_response_that_no_training_row_has_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [row | {"chosen": "good"} for row in texts(2)])
    data = PromptDataModule(train=source, val=jsonl(tmp_path / "b.jsonl", texts(2)), columns={"target": "chosen"})
    data.setup("fit")  # rows for validation may be without
    with pytest.raises(ValueError, match="columns maps target to 'chosne', but no row of the train split has text"):
        PromptDataModule(train=source, columns={"target": "chosne"}).setup("fit")


def test_equal_responses_are_refused_with_their_row(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [row | {"target": "4", "rejected": "4"} for row in texts(1)])
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\), rejected: equals the target; .* \(E20 pair of equal responses\)"
    ):
        PromptDataModule(train=source).setup("fit")


def test_image_deleted_after_the_audit_is_reported_with_its_row(tmp_path, rows):
    data = PromptDataModule(train=as_jsonl(tmp_path, rows), columns=COLUMNS)
    data.setup("fit")
    (tmp_path / "blue.png").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl row 1 \(line 2\), image\[0\]: 'blue\.png' is not in image_root"):
        data.train_prompts[1]


def test_setup_reads_the_splits_of_its_stage_only(tmp_path):
    data = PromptDataModule(train=str(tmp_path / "none.jsonl"), test=jsonl(tmp_path / "test.jsonl", texts(3)))
    data.setup("test")
    assert len(data.test_prompts) == 3
    with pytest.raises(FileNotFoundError, match=r"data file .*none\.jsonl' does not exist"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"prompt": "a"}', "holds dict; a .json data file is one list of objects"),
        ("a.json", "[1,", "a.json is not JSON"),
        ("a.csv", "prompt,prompt\na,b\n", "the header names a column twice: prompt, prompt"),
        ("a.txt", "a", r"unknown kind of data file '\.txt'; known are \.jsonl, \.json, \.csv, \.parquet, \.arrow"),
        ("a.jsonl", "", "the train split has no rows: .*a.jsonl"),
    ],
)
def test_unreadable_file_is_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        PromptDataModule(train=str(tmp_path / name)).setup("fit")


def test_missing_folder_or_split_is_refused(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match=r"data folder '\./none' does not exist"):
        PromptDataModule(train="./none@train").setup("fit")
    source = as_folder_of_splits(tmp_path, rows).removesuffix("@part")
    with pytest.raises(ValueError, match=r"holds the splits part; name one: .*train@part"):
        PromptDataModule(train=source).setup("fit")


def test_stage_without_source_is_refused_with_the_option():
    with pytest.raises(ValueError, match="there is no source for the test split; set test to a file or data set"):
        PromptDataModule().setup("test")


def test_e14_too_long_prompt_is_refused_by_the_processor_count(tmp_path, rows):
    from rllava_pl.models import tiny
    from rllava_pl.models.encoding import encode
    from rllava_pl.models.processors import load_processor

    rows[1]["problem"] = "<image>" + "Which color, too? " * 20
    source = as_jsonl(tmp_path, rows)
    model = str(tiny.build(tmp_path / "model", questions=["Which color?"], answers=["red"], warmup_steps=0))
    unlimited = PromptDataModule(train=source, columns=COLUMNS).audit("train")
    short, long = (len(x) for x in encode(load_processor(model), list(unlimited)))
    assert short < long
    for limit, kept in ((long, 2), (long - 1, 1), (short, 1)):
        audit = PromptDataModule(train=source, columns=COLUMNS, max_prompt_tokens=limit, processor_path=model).audit(
            "train"
        )
        assert len(audit) == kept
    (rejection,) = audit.rejections
    assert (rejection.row, rejection.code) == (1, "E14")
    assert rejection.message == f"has {long} tokens after the chat template; max_prompt_tokens is {short}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_reject_fraction": 1.0}, ValueError, "max_reject_fraction is 1.0; it is a share from 0 to below 1"),
        ({"image_root": "nowhere"}, FileNotFoundError, "image_root 'nowhere' is not a folder"),
        ({"max_prompt_tokens": 9}, ValueError, "max_prompt_tokens is 9, but processor_path names no model"),
    ],
)
def test_wrong_option_is_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        PromptDataModule(**options)
