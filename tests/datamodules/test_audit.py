"""What the audit checks beyond single fields, in every kind of file, and the reports it writes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rllava_pl.datamodules import DataError, PromptDataModule
from rllava_pl.datamodules.audit import audit, audit_prompts
from rllava_pl.datamodules.schema import RowSchema
from rllava_pl.datamodules.tables import JsonLines
from rllava_pl.types import IMAGE, Markup, Message, Prompt
from tests.datamodules.hostile import encoded, noise

ROW: dict[str, object] = {"prompt": "Which?", "answer": "4"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Parquet files are unpacked into the cache of ``datasets``; keep that out of the home directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from rllava_pl.models import tiny

    return str(tiny.build(tmp_path_factory.mktemp("m") / "m", questions=["Which?"], answers=["4"], warmup_steps=0))


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(source: str, **options: object) -> list[tuple[int, str, str]]:
    rows = PromptDataModule(train=source, **options).audit("train")
    assert len(rows) + len(rows.rejections) == rows.total
    return [(rejection.row, rejection.field, rejection.code) for rejection in rows.rejections]


# -- broken rows in every kind of file --------------------------------------------------------------------------------


def test_lines_inside_a_long_csv_cell_are_not_rows(tmp_path):
    """The default limit of the csv module, 131,072 characters, would make it resume inside the cell."""
    long = "\n".join(["Ignore the label,0"] * 8_000)
    (tmp_path / "a.csv").write_text(f'prompt,answer\nfirst,1\n"{long}",2\nlast,3\n')
    rows = PromptDataModule(train=str(tmp_path / "a.csv")).audit("train")
    assert rows.total == 3
    assert "0" not in [prompt.answer for prompt in rows]


def test_csv_rows_are_refused_one_by_one_with_their_line(tmp_path):
    lines = [
        b"prompt,answer,note",
        b"right,1,a",  # row 0, line 2
        b"one cell too few,2",
        b'"two',
        b'lines","3",',  # right; begins on line 4
        b"one,cell,too,many",
        b'"quote"d,4,',
        b"\xff\xfe,5,",
        b"fine,6,\xff",
        b"",
        b",7,",
        b'"never closed,8,',
        b"swallowed,9,",
    ]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(lines))
    rows = PromptDataModule(train=str(tmp_path / "a.csv")).audit("train")
    assert [(r.row, r.line, r.field, r.code) for r in rows.rejections] == [
        (1, 3, "line", "E02"),
        (3, 6, "line", "E02"),
        (4, 7, "line", "E02"),
        (5, 8, "prompt", "E04"),
        (6, 9, "note", "E04"),
        (7, 11, "prompt", "E03"),
        (8, 12, "line", "E02"),
    ]
    messages = [r.message for r in rows.rejections]
    assert messages[0] == "has 2 cells, the header has 3; write empty cells as well"
    assert messages[1] == "has 4 cells, the header has 3; quote cells that contain commas"
    assert messages[6].endswith("a quote is not closed, and the rest of the file is inside it")
    assert [prompt.answer for prompt in rows] == ["1", "3"]
    assert rows.total == len(rows) + len(rows.rejections) == 9


def test_parquet_rows_are_refused_one_by_one(tmp_path):
    from datasets import Dataset

    image = {"bytes": encoded(noise()), "path": None}
    rows = [
        {"prompt": "Which?", "images": [image], "answer": "4"},
        {"prompt": None, "images": [image], "answer": "4"},
        {"prompt": "Which?", "images": [{"bytes": image["bytes"][:60], "path": None}], "answer": "4"},
        {"prompt": "<image><image>", "images": [image], "answer": "4"},
        {"prompt": "Which?", "images": [{"bytes": None, "path": "/etc/passwd"}], "answer": "4"},
        {"prompt": "Which?", "images": [None], "answer": "4"},
        {"prompt": "Which?", "images": [], "answer": ""},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert refused(str(tmp_path / "a.parquet")) == [
        (1, "prompt", "E01"),
        (2, "images[0]", "E10"),
        (3, "images", "E05"),
        (4, "images[0]", "E07"),
        (5, "images[0]", "E02"),
        (6, "answer", "E03"),
    ]


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({
        "prompt": pa.array([b"right", b"\xff\xfe"]).cast(pa.binary()).view(pa.string()),
        "answer": pa.array([1.5, math.nan]),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refused(str(tmp_path / "a.parquet")) == [(1, "row", "E00")]


def test_json_rows_are_refused_one_by_one_and_broken_files_as_a_whole(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROW, 4, ROW | {"answer": None}, {}]))
    assert refused(str(tmp_path / "a.json")) == [(1, "row", "E02"), (2, "answer", "E01"), (3, "prompt", "E01")]
    (tmp_path / "b.json").write_text(json.dumps([ROW])[:-3])
    with pytest.raises(ValueError, match=r"b\.json is not JSON in UTF-8: .*in a \.jsonl file, .* refused one by one"):
        refused(str(tmp_path / "b.json"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_file_of_another_format_than_its_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as {name[2:]}: "):
        refused(str(tmp_path / name))


def test_blank_lines_of_jsonl_are_not_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "1", "answer": "1"}\r\n\n  \n{"prompt": "2", "answer": "2"}\n{"prompt": ""}'
    )
    rows = PromptDataModule(train=str(tmp_path / "a.jsonl")).audit("train")
    assert [prompt.answer for prompt in rows] == ["1", "2"]
    assert [(r.row, r.line) for r in rows.rejections] == [(2, 5)]


# -- ids and counts ---------------------------------------------------------------------------------------------------


def test_files_of_equal_name_give_unique_uids(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "train.jsonl", ROW, ROW)
    rows = PromptDataModule(train=[str(tmp_path / folder / "train.jsonl") for folder in "aba"]).audit("train")
    uids = [prompt.uid for prompt in rows]
    assert uids == ["train:0", "train:1", "train-2:0", "train-2:1", "train-3:0", "train-3:1"]


def test_repairs_are_counted_by_code(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    source = jsonl(
        tmp_path / "a.jsonl",
        ROW | {"prompt": "a\r\nb\x07"},
        ROW | {"images": "a.png"},
        ROW | {"blob": "x" * 65_537, "fine": "x" * 65_536},
        ROW | {"id": "\x1bq"},
        ROW | {"prompt": "", "images": "a.png"},  # refused, so nothing is counted
    )
    rows = PromptDataModule(train=source).audit("train")
    assert rows.repairs == Counter(W01=1, W03=2, W04=1)
    assert rows[0].messages == (Message("user", ("a\nb",)),)
    assert list(rows[2].metadata) == ["fine"]
    assert rows[3].uid == "q"


def test_unexpected_exception_refuses_its_row_only(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", ROW, ROW | {"prompt": "boom"}, ROW)
    parse = RowSchema.parse

    def faulty(self, row, *names):
        if row["prompt"] == "boom":
            raise ZeroDivisionError("a bug")
        return parse(self, row, *names)

    monkeypatch.setattr(RowSchema, "parse", faulty)
    rows = PromptDataModule(train=source).audit("train")
    assert [(r.row, r.code) for r in rows.rejections] == [(1, "E00")]
    assert "raised ZeroDivisionError: a bug" in rows.rejections[0].message
    assert len(rows) == 2
    rows.audit.kept.append((0, 1))
    with pytest.raises(ZeroDivisionError) as caught:
        rows[2]
    assert caught.value.__notes__ == [f"while reading {source} row 1"]


def test_unreadable_row_is_refused(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", ROW, ROW)

    def unreadable(self, index):
        raise OverflowError("a date of the year 300000")

    monkeypatch.setattr(JsonLines, "item", unreadable)
    rejections = PromptDataModule(train=source).audit("train").rejections
    assert [(r.row, r.code, r.id) for r in rejections] == [(0, "E00", "a:0"), (1, "E00", "a:1")]


def test_ranks_share_the_audit_and_get_equal_results(tmp_path, monkeypatch):
    """Three ranks, one after the other: each gets what all of them gathered."""
    rows = [ROW | {"id": f"{k % 7}"} if k % 3 else {"prompt": ""} for k in range(11)]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    data = PromptDataModule(train=source)
    alone = data.audit("train").audit
    sources, gathered = data.sources("train"), []
    monkeypatch.setattr("rllava_pl.datamodules.audit.world_size", lambda: 3)
    for complete in (False, True):
        for number in range(3):
            monkeypatch.setattr("rllava_pl.datamodules.audit.rank", lambda number=number: number)
            if not complete:
                monkeypatch.setattr("rllava_pl.datamodules.audit.gather_objects", _collect(gathered))
                with pytest.raises(InterruptedError):
                    audit(sources, all_ranks=True)
            else:
                monkeypatch.setattr("rllava_pl.datamodules.audit.gather_objects", lambda own: gathered)
                assert audit(sources, all_ranks=True) == alone
    assert [len(share) for share in gathered] == [4, 4, 3]
    assert (len(alone.kept), len(alone.rejections)) == (6, 5)  # four empty ones; the id of row 8 is that of row 1


def _collect(shares: list[object]):
    def gather(own: object) -> None:
        shares.append(own)
        raise InterruptedError

    return gather


def test_messages_of_hostile_rows_are_printable_and_short(tmp_path):
    hostile = "\x1b[2J\ud800" + "x" * 10_000
    source = jsonl(tmp_path / "a.jsonl", ROW | {"id": hostile}, {hostile: 1}, ROW | {"messages": [{"role": hostile}]})
    for rejection in PromptDataModule(train=source).audit("train").rejections:
        assert str(rejection).encode() and str(rejection).isprintable()
        assert len(str(rejection)) < 1500


def test_prompts_without_files_are_checked():
    image, message = Image.new("RGB", (4, 4)), Message("user", (IMAGE, "Which?"))

    class Faulty(list):
        def __getitem__(self, index):
            return super().__getitem__(index)() if index == 3 else super().__getitem__(index)

    prompts = Faulty([Prompt("a", (message,), (image,)), Prompt("b", (message,)), Prompt("a", (message,), (image,)), 4])
    result = audit_prompts(prompts, "mine")
    assert [(r.row, r.code, r.id) for r in result.rejections] == [(1, "E05", "b"), (2, "E15", "a"), (3, "E00", "")]
    assert (result.total, result.kept) == (4, [(0, 0)])


# -- answers and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (
            "number",
            ["4", "-0.5", 3, 0.25, "1/2", "1,000", "50%", "<answer>4</answer>"],
            ["four", "4 dots", "1e9", "1/0"],
        ),
        ("integer", ["4", 4, "-1", "1,000"], ["4.5", 0.5, "four", "1/2"]),
        ("box", [[1, 2, 3, 4], "[0.5, 0, 1, 1]"], [[3, 2, 1, 4], [1, 2, 3], "1,2,3,4", [1, 2, True, 4], [1, 1, 1, 2]]),
        ("box", [[-5, -5, 0, 0]], ["[1, 2, NaN, 4]", "[1, 2, 1e999, 4]", "__import__('os')", {"x": 1}, "null"]),
        ("json", ['{"a": 1}', [1], "null", "4", {"a": None}], ["{'a': 1}", "nope", "[NaN]", "[" * 9000]),
        ("text", ["anything"], ["x" * 65_537]),
    ],
)
def test_e16_answer_of_another_kind_is_refused(tmp_path, kind, right, wrong):
    source = jsonl(tmp_path / "a.jsonl", *(ROW | {"answer": answer} for answer in (*right, *wrong)))
    expected = [(row, "answer", "E16") for row in range(len(right), len(right) + len(wrong))]
    assert refused(source, answer_kind=kind) == expected


def test_e16_message_says_what_is_needed(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ROW | {"answer": "four"})
    with pytest.raises(DataError, match=r"answer: is 'four'; answer_kind number needs a number such as 4, -0.5, 1/2"):
        PromptDataModule(train=source, answer_kind="number").setup("fit")


def test_e19_target_that_contradicts_the_answer_is_refused(tmp_path):
    targets = ["<think>2 + 2</think><answer>4.0</answer>", "no tags", "<answer>5</answer> no, <answer>4</answer>"]
    wrong = "<answer>4</answer> no, <answer>5</answer>"
    source = jsonl(tmp_path / "a.jsonl", *(ROW | {"target": target} for target in [*targets, wrong]))
    assert refused(source) == []
    assert refused(source, match_targets=True) == [(3, "target", "E19")]


# -- by the model's processor -----------------------------------------------------------------------------------------


def test_special_tokens_are_escaped_refused_or_allowed(tmp_path, model):
    spelling = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>"}]}
        ]
    }
    source = jsonl(
        tmp_path / "a.jsonl",
        ROW,
        ROW | {"prompt": "a <|im_end|> b"},
        ROW | {"prompt": "tags <answer> and <think>"},  # a policy writes these by itself
        {"answer": "4", **spelling},
        {"answer": "4", "messages": [{"role": "user", "content": [{"type": "text", "text": "the tag <image>"}]}]},
    )
    rows = PromptDataModule(train=source, processor_path=model).audit("train")
    assert (rows.rejections, rows.repairs) == ([], Counter(W02=3))
    reject = refused(source, processor_path=model, special_tokens="reject")
    assert reject == [(1, "prompt", "E13"), (3, "messages", "E13"), (4, "messages", "E13")]
    assert refused(source, processor_path=model, special_tokens="allow") == [(4, "messages", "E13")]
    allowed = PromptDataModule(train=source, special_tokens="allow").audit("train")
    assert isinstance(allowed[1].messages[0].parts[0], Markup)


def test_response_with_a_token_that_a_policy_cannot_write_is_refused(tmp_path, model):
    pair = ROW | {"rejected": "bad"}
    source = jsonl(
        tmp_path / "a.jsonl",
        pair | {"target": "<think>so</think><answer>4</answer>"},
        pair | {"target": "4<|im_end|>"},
        pair | {"target": "look: <image>"},
        pair | {"target": "fine", "rejected": "<|endoftext|>"},
        pair | {"target": "<end_of_utterance> is special, and a policy may sample it"},
    )
    expected = [(1, "target", "E13"), (2, "target", "E13"), (3, "rejected", "E13")]
    assert refused(source, processor_path=model, special_tokens="allow") == expected
    assert refused(source, processor_path=model) == [*expected, (4, "target", "E13")]


def test_e18_responses_are_measured_with_their_end_token(tmp_path, model):
    from rllava_pl.models import VLM

    length = len(VLM(model).load().encode_response("four dots"))
    source = jsonl(tmp_path / "a.jsonl", ROW | {"target": "four dots"})
    assert refused(source, processor_path=model, max_target_tokens=length) == []
    assert refused(source, processor_path=model, max_target_tokens=length - 1) == [(0, "target", "E18")]


def test_images_for_a_text_only_model_are_refused(tmp_path, model):
    """A directory with a tokenizer and the config of a text-only model."""
    from transformers import AutoTokenizer, Qwen2Config

    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "text")
    Qwen2Config().save_pretrained(tmp_path / "text")
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    source = jsonl(tmp_path / "a.jsonl", ROW, ROW | {"images": "a.png"})
    assert refused(source, processor_path=str(tmp_path / "text")) == [(1, "prompt", "E02")]


def test_e17_messages_that_the_chat_template_refuses(tmp_path, model):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = folder / "chat_template.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    source = jsonl(tmp_path / "a.jsonl", ROW, {"messages": chat, "answer": "4"})
    assert refused(source, processor_path=str(folder)) == [(1, "messages", "E17")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"special_tokens": "reject"}, "special_tokens is reject, but processor_path names no model to measure with"),
        ({"max_target_tokens": 5}, "max_target_tokens is 5, but processor_path names no model"),
        ({"special_tokens": "escpae"}, "special_tokens is 'escpae'; it is one of escape, reject, allow"),
        ({"answer_kind": "int"}, "answer_kind is 'int'; it is one of text, number, integer, box, json"),
        ({"image_formats": ["EPS"]}, "image_formats is 'EPS'; it is one of JPEG, PNG, WEBP, BMP, GIF, TIFF"),
        ({"animations": "all"}, "animations is 'all'; it is one of reject, first_frame"),
    ],
)
def test_wrong_option_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**options)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_one_percent_of_rows_may_be_refused_by_default(tmp_path):
    right = [ROW] * 99
    data = PromptDataModule(train=jsonl(tmp_path / "a.jsonl", *right, {}), batch_size=4)
    with pytest.warns(UserWarning, match=r"left out 1 of 100 rows \(E01 missing field: 1\)$"):
        data.setup("fit")
    assert len(data.train_prompts) == 99
    with pytest.raises(DataError, match=r"2 of 101 rows cannot be used"):
        PromptDataModule(train=jsonl(tmp_path / "a.jsonl", *right, {}, {})).setup("fit")


def test_report_has_one_line_per_refused_row_and_is_named_in_the_error(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ROW, {"id": "q", "prompt": ""}, {"prompt": "Which?"})
    report = tmp_path / "made" / "{split}.jsonl"
    with pytest.raises(DataError, match=r"all of them: .*made/train\.jsonl$"):
        PromptDataModule(train=source, report=str(report)).setup("fit")
    lines = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "source": source,
        "row": 1,
        "field": "prompt",
        "code": "E03",
        "message": "is empty; leave the row out, or fill it in",
        "id": "q",
        "line": 2,
    }
    assert (lines[1]["id"], lines[1]["code"], len(lines)) == ("a:2", "E01", 2)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["train.jsonl"]  # no draft is left


def test_report_of_a_run_is_in_its_folder(tmp_path):
    from lightning.pytorch import Trainer

    data = PromptDataModule(train=jsonl(tmp_path / "a.jsonl", {}))
    data.trainer = Trainer(
        default_root_dir=tmp_path / "run", logger=False, accelerator="cpu", enable_checkpointing=False
    )
    with pytest.raises(DataError, match=r"run/rejected_train\.jsonl"):
        data.setup("fit")
    assert (tmp_path / "run" / "rejected_train.jsonl").read_text().count("\n") == 1


def test_json_row_with_a_repeated_field_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "4", "answer": "5"}\n{"prompt": "q", "answer": "4"}\n')
    rows = PromptDataModule(train=str(tmp_path / "a.jsonl")).audit("train")
    assert [(r.row, r.code, r.message) for r in rows.rejections] == [(0, "E02", "names 'answer' twice")]
