"""From columns to prompts: every code of the text fields has a row that triggers it and a clean one that does not."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pytest

from rllava_pl.datamodules.rejections import RowError
from rllava_pl.datamodules.schema import RowSchema
from rllava_pl.types import IMAGE, Message

ROW = {"prompt": "Which digit?", "answer": "4"}


def code_of(row: dict[object, object], **options: object) -> str:
    with pytest.raises(RowError) as caught:
        RowSchema(**options).parse(row, "t:0")
    return f"{caught.value.code} {caught.value.field}"


def messages_of(value: object) -> tuple[Message, ...]:
    return RowSchema().parse({"messages": value, "answer": "4", "images": []}, "t:0").prompt.messages


def test_clean_row_is_parsed_without_repairs():
    parsed = RowSchema().parse(ROW, "t:0")
    assert parsed.prompt.messages == (Message("user", ("Which digit?",)),)
    assert (parsed.prompt.uid, parsed.prompt.answer, parsed.images, parsed.prompt.metadata) == ("t:0", "4", (), {})


def test_columns_are_mapped_and_the_others_are_metadata():
    columns = {"prompt": "problem", "images": "image", "answer": "solution", "id": "key"}
    row = {"problem": "<image>Which?", "image": "a.png", "solution": 4, "key": 17, "level": "hard", "tags": ["é", 1]}
    row |= {"when": datetime.date(2025, 1, 2), "raw": b"\x00", "none": None, "scan": {"bytes": b"", "path": None}}
    row |= {"size": [3, 4.5], "deep": {"on": [True, None, datetime.date(2025, 1, 2)]}, "share": Decimal("0.10")}
    parsed = RowSchema(columns).parse(row, "t:0")
    assert parsed.prompt.messages == (Message("user", (IMAGE, "Which?")),)
    assert (parsed.prompt.uid, parsed.prompt.answer, parsed.images) == ("17", 4, ("a.png",))
    assert parsed.prompt.metadata == {
        "level": "hard",
        "tags": ["é", 1],
        "when": "2025-01-02",
        "size": [3, 4.5],
        "deep": {"on": [True, None, "2025-01-02"]},
        "share": "0.10",
    }


def test_system_prompt_and_template_surround_the_prompt_column_only():
    schema = RowSchema(system_prompt="Be brief.", template="Q: {prompt} {A}")
    assert schema.parse(ROW, "t:0").prompt.messages == (
        Message("system", ("Be brief.",)),
        Message("user", ("Q: Which digit? {A}",)),
    )
    chat = {"messages": [{"role": "user", "content": "Which?"}], "answer": "4"}
    assert schema.parse(chat, "t:0").prompt.messages == (Message("user", ("Which?",)),)


@pytest.mark.parametrize("value", ["4", 4, 0.5, [1, "a"], {"x": [1, None]}, " 4 ", 10**30])
def test_answer_keeps_the_value_and_type_of_the_data(value):
    answer = RowSchema().parse(ROW | {"answer": value}, "t:0").prompt.answer
    assert answer == value and type(answer) is type(value)


@pytest.mark.parametrize(
    ("value", "answer"), [(Decimal("1.50"), "1.50"), (datetime.date(2025, 1, 2), "2025-01-02"), ([Decimal(2)], ["2"])]
)
def test_answer_without_a_json_type_becomes_text(value, answer):
    assert RowSchema().parse(ROW | {"answer": value}, "t:0").prompt.answer == answer


def test_answer_may_be_absent_when_no_reward_reads_it():
    for row in ({"prompt": "Which?"}, ROW | {"answer": None}, ROW | {"answer": ""}):
        assert RowSchema(require_answer=False).parse(row, "t:0").prompt.answer is None


def test_text_and_typed_content_give_the_same_messages():
    typed = [{"type": "text", "text": "Look: "}, {"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    parsed = [
        RowSchema().parse({"messages": [{"role": "user", "content": c}], "images": ["a"], "answer": "4"}, "t:0")
        for c in (typed, "Look: <image>Which?")
    ]
    assert parsed[0].prompt.messages == parsed[1].prompt.messages == (Message("user", ("Look: ", IMAGE, "Which?")),)


def test_w01_slots_are_put_in_front_of_the_first_user_message():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Compare."}]
    parsed = RowSchema().parse({"messages": chat, "images": ["a", "b"], "answer": "4"}, "t:0")
    assert parsed.prompt.messages[1] == Message("user", (IMAGE, IMAGE, "Compare."))
    assert parsed.repairs == ("W01",)
    assert RowSchema().parse(ROW | {"prompt": "<image>a", "images": ["a"]}, "t:0").repairs == ()


@pytest.mark.parametrize("images", [None, "", [], ()])
def test_row_without_images_has_none(images):
    assert RowSchema().parse(ROW | {"images": images}, "t:0").images == ()


def test_tool_messages_are_kept():
    chat = [
        {"role": "user", "content": "Find."},
        {"role": "assistant", "content": "search"},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    assert [message.role for message in messages_of(chat)] == ["user", "assistant", "tool", "tool"]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "4"}, "E01 prompt"),
        ({"prompt": None, "messages": None, "answer": "4"}, "E01 prompt"),
        ({"prompt": "Which?"}, "E01 answer"),
        (ROW | {"prompt": b"Which?"}, "E02 prompt"),
        (ROW | {"prompt": 4}, "E02 prompt"),
        (ROW | {"prompt": ["Which?"]}, "E02 prompt"),
        (ROW | {"answer": b"4"}, "E02 answer"),
        (ROW | {"answer": True}, "E02 answer"),
        (ROW | {"answer": float("nan")}, "E02 answer"),
        (ROW | {"answer": [float("inf")]}, "E02 answer"),
        (ROW | {"answer": [Decimal("NaN")]}, "E02 answer"),
        (ROW | {"id": 1.5}, "E02 id"),
        (ROW | {"prompt": " \n"}, "E03 prompt"),
        (ROW | {"answer": " "}, "E03 answer"),
        (ROW | {"id": ""}, "E03 id"),
        (ROW | {"prompt": "a\ud800"}, "E04 prompt"),
        (ROW | {"answer": "a\0"}, "E04 answer"),
        (ROW | {"answer": ["a", {"b": "a\0"}]}, "E04 answer"),
        (ROW | {"notes": ["a\0"]}, "E04 notes"),
        (ROW | {"notes": {"\ud800": 1}}, "E04 notes"),
        (ROW | {"prompt": "<image>a"}, "E05 images"),
        (ROW | {"prompt": "<image>a", "images": ["a", "b"]}, "E05 images"),
        (ROW | {"prompt": "<image><image>a", "images": "a"}, "E05 images"),
        ({"messages": "hello", "answer": "4"}, "E02 messages"),
        ({"messages": ["hello"], "answer": "4"}, "E02 messages[0]"),
        ({"messages": [{"role": "user", "content": None}], "answer": "4"}, "E02 messages[0].content"),
        ({"messages": [{"role": "user", "content": []}], "answer": "4"}, "E03 messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "4"}, "E02 messages[0].content[0]"),
        ({"messages": [], "answer": "4"}, "E17 messages"),
        ({"messages": [{"role": "human", "content": "a"}], "answer": "4"}, "E17 messages[0]"),
        ({"messages": [USER, {"role": "tool", "content": "a"}], "answer": "4"}, "E17 messages[1]"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}], "answer": "4"}, "E17 messages"),
    ],
)
def test_bad_row_is_refused_with_code_and_field(row, expected):
    assert code_of(row) == expected


def test_e01_missing_mapped_column_lists_the_existing_ones():
    with pytest.raises(RowError, match="is not a column; the row has prompt, answer"):
        RowSchema({"answer": "solution"}).parse(ROW, "t:0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"question": "q"}},
            "unknown field 'question'; fields are id, prompt, messages, images, answer, target, rejected",
        ),
        ({"columns": {"prompt": "p", "messages": "m"}}, "both prompt and messages"),
        ({"template": "no place"}, r"template 'no place' must contain \{prompt\} exactly once"),
    ],
)
def test_wrong_schema_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        RowSchema(**options)


def test_too_deeply_nested_answer_is_a_bad_row():
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert code_of(ROW | {"answer": deep}) == "E02 answer"
    assert RowSchema().parse(ROW | {"notes": deep}, "t:0").prompt.metadata == {}


PAIR = ROW | {"target": "good", "rejected": "bad"}


def responses_of(row: dict[str, object], **options: object) -> tuple[str, str]:
    parsed = RowSchema(**options).parse(row, "t:0")
    return parsed.prompt.target, parsed.prompt.rejected


def test_rows_without_responses_have_none():
    assert responses_of(ROW) == ("", "")
    assert responses_of(ROW | {"target": None, "rejected": ""}) == ("", "")
    assert responses_of(ROW, columns={"target": "chosen"}) == ("", "")


def test_responses_are_not_in_the_metadata():
    parsed = RowSchema({"target": "chosen"}).parse(ROW | {"chosen": "good", "rejected": "bad", "target": "x"}, "t:0")
    assert (parsed.prompt.target, parsed.prompt.rejected) == ("good", "bad")
    assert parsed.prompt.metadata == {"target": "x"}  # chosen is the target, so this is a column like any other


def test_column_mapped_to_another_field_is_not_a_response():
    assert responses_of({"prompt": "Which?", "target": 4}, columns={"answer": "target"}) == ("", "")
    # Unless it is mapped to both: here the label itself is imitated.
    both = RowSchema({"answer": "label", "target": "label"}).parse({"prompt": "Which?", "label": "4"}, "t:0")
    assert (both.prompt.answer, both.prompt.target) == ("4", "4")


@pytest.mark.parametrize("name", ["target", "rejected"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require_answer": False}, None),
        ({"require_answer": False, "require_rejected": True}, "is missing; a pair is a target and a rejected response"),
    ],
)
def test_pair_needs_both_responses(name, options, message):
    row = {"prompt": "Which?", name: "4"}
    if message is None:
        assert "4" in responses_of(row, **options)
        return
    with pytest.raises(RowError, match=message) as caught:
        RowSchema(**options).parse(row, "t:0")
    assert (caught.value.code, caught.value.field) == ("E01", {"target": "rejected", "rejected": "target"}[name])


def test_e01_missing_target_says_which_option_allows_it():
    for row in (ROW, ROW | {"target": ""}, ROW | {"target": []}):
        with pytest.raises(RowError, match="is missing; set require_target: false if rows may do without") as caught:
            RowSchema({"target": "target"}, require_target=True).parse(row, "t:0")
        assert (caught.value.code, caught.value.field) == ("E01", "target")
    assert responses_of({"prompt": "Which?", "target": "4"}, require_target=True, require_answer=False) == ("4", "")


@pytest.mark.parametrize("rejected", ["good", " good\n", ["good"], [{"role": "assistant", "content": "good"}]])
def test_e20_equal_responses_are_no_pair(rejected):
    with pytest.raises(RowError, match="equals the target; one response of a pair must be better") as caught:
        RowSchema().parse(PAIR | {"rejected": rejected}, "t:0")
    assert (caught.value.code, caught.value.field) == ("E20", "rejected")


@pytest.mark.parametrize("name", ["target", "rejected"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, "E02 {}"),
        (float("nan"), "E02 {}"),
        (b"4", "E02 {}"),
        ([4, "5"], "E02 {}[0]"),
        (" \n", "E03 {}"),
        ("a\ud800", "E04 {}"),
        (["a\0"], "E04 {}[0]"),
        ([{"role": "user", "content": "4"}], "E17 {}"),
        ([{"role": "assistant", "content": 4}], "E02 {}[0].content"),
    ],
)
def test_bad_response_is_refused_with_code_and_field(name, value, expected):
    assert code_of(PAIR | {name: value}) == expected.format(name)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("Which? <think>", "<think>It is 4.</think>4", "It is 4.</think>4"),
        ("Which? <think>\n", "<think>\nIt is 4.</think>4", "It is 4.</think>4"),  # the line break is given, too
        ("Which? <think>\n", "\n<think>It is 4.</think>4", "It is 4.</think>4"),
        ("Which? <think>", "<think>\nIt is 4.</think>4", "\nIt is 4.</think>4"),
        ("Which? <think>", "<think><think>4", "<think>4"),  # one, not all
        ("Which? <think>", "It is 4.</think>4", "It is 4.</think>4"),
        ("Which? <think>", "", ""),
        ("Which?", "<think>It is 4.</think>4", "<think>It is 4.</think>4"),
        ("Use <think> tags.", "<think>It is 4.</think>4", "<think>It is 4.</think>4"),
        ("Which?", "\n<think>It is 4.</think>4", "\n<think>It is 4.</think>4"),
        ("Use <think> tags. <think>\n", "<think>\nIt is 4.</think>4", "It is 4.</think>4"),
        ("Which? </think>", "<think>It is 4.</think>4", "<think>It is 4.</think>4"),
    ],
)
def test_think_tag_opened_by_the_prompt_is_removed_from_responses(prompt, response, expected):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    for row in ({"prompt": prompt}, {"messages": chat, "images": ["a"]}):
        assert responses_of(row | {"answer": "4", "target": response})[0] == expected
        assert responses_of(row | {"answer": "4", "rejected": response})[1] == expected


def test_think_tag_may_come_from_the_template_and_not_stand_before_an_image():
    row = ROW | {"target": "<think>It is 4.</think>4"}
    assert responses_of(row, template="{prompt}\n<think>\n")[0] == "It is 4.</think>4"
    assert responses_of(row | {"prompt": "<think><image>", "images": ["a"]})[0] == "<think>It is 4.</think>4"


def test_e03_response_of_the_opened_think_tag_alone_is_refused():
    with pytest.raises(RowError, match="has nothing behind the <think> that the prompt already ends with") as caught:
        RowSchema(template="{prompt} <think>").parse(ROW | {"target": "<think>\n"}, "t:0")
    assert (caught.value.code, caught.value.field) == ("E03", "target")


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"prompt": "<video>What happens?", "answer": "4"}, "E05", "has a <video> slot"),
        ({"prompt": "\u200b \u2060", "answer": "4"}, "E03", "is empty"),
        ({"prompt": "q", "answer": "\U0001f600" * 20_000}, "E16", "has 80000 bytes; an answer has at most 65536"),
    ],
)
def test_video_invisible_text_and_huge_answer_are_refused(row, code, said):
    with pytest.raises(RowError, match=said) as error:
        RowSchema().parse(row, "a:0")
    assert error.value.code == code


def test_metadata_of_a_row_are_limited_to_64_kib():
    row = {"prompt": "q", "answer": "4"} | {f"m{k}": "x" * 30_000 for k in range(5)} | {"small": "é"}
    parsed = RowSchema().parse(row, "a:0")
    assert list(parsed.prompt.metadata) == ["m0", "m1", "small"] and parsed.repairs == ("W04",)
