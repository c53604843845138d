"""The table shows the same prompts in every column and does not affect the training."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from rllava_pl.callbacks import RolloutTable
from rllava_pl.callbacks.rollout_page import Answer, Moment
from rllava_pl.callbacks.rollout_table import print_before_and_after
from rllava_pl.types import Prompt
from tests import runs
from tests.callbacks.conftest import ROLLOUTS, Run


def test_columns_before_during_and_after_training(run: Run) -> None:
    table = run.callbacks[RolloutTable]
    assert [moment.rollout for moment in table.moments] == [0, 2, 4]
    for moment in table.moments:
        assert len(moment.greedy) == 3
        assert [len(answers) for answers in moment.sampled] == [2, 2, 2]
    answer = table.moments[-1].greedy[0]
    assert set(answer.components) == {"accuracy", "format"}
    assert answer.reward == pytest.approx(0.9 * answer.components["accuracy"] + 0.1 * answer.components["format"])


def test_the_table_does_not_affect_the_training(run: Run, tmp_path: Path) -> None:
    plain = runs.module(max_rollouts=ROLLOUTS)
    runs.trainer(tmp_path).fit(plain, runs.data())
    watched = run.module.state_dict()
    assert all(torch.equal(tensor, watched[name]) for name, tensor in plain.state_dict().items())


def test_the_page_has_every_column_and_every_image_once(run: Run) -> None:
    assert run.callbacks[RolloutTable].path == run.folder / "rollouts.html"
    assert re.findall(r"Before training|Rollout \d+", run.page) == ["Before training", "Rollout 2", "Rollout 4"]
    assert run.page.count("data:image/png;base64,") == 3
    assert [uid for uid in re.findall(r'class="uid">([^<]*)', run.page)] == [f"color-val:{k}" for k in range(3)]
    assert list(run.folder.glob(".*")) == []  # no temporary file is left


def test_a_resumed_run_keeps_its_columns(run: Run, resumed: Run) -> None:
    assert resumed.callbacks[RolloutTable].moments == run.callbacks[RolloutTable].moments
    assert resumed.page == run.page
    assert resumed.folder != run.folder


def test_tensorboard_has_texts_by_rollout_and_images_once(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder)).Reload()
    texts = events.Tensors("table/prompt_1/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines())  # a code block, not Markdown
    assert "expected: green" in text and text.count("sampled, reward") == 2
    assert [event.step for event in events.Images("table/prompt_1/image_0")] == [0]


def test_first_and_last_column_are_printed_at_the_end(run: Run) -> None:
    printed = run.output.partition("Most likely answers, rollout 0 and 4")[2]
    assert all(f"│ {color}" in printed for color in ("red", "green", "blue"))
    assert str(run.folder / "rollouts.html") in printed  # unwrapped


def test_printed_answers_have_no_markup_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = Answer("[red]x[/]\x1b[2J\nnext", "stop", None)
    print_before_and_after([Prompt("p", ())], [Moment(0, [hostile], [[]])], Path("table.html"))
    printed = capsys.readouterr().out
    assert "[red]x[/]\ufffd[2J next" in printed
    assert "\x1b" not in printed


def test_data_without_validation_prompts_has_no_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = RolloutTable()
    with caplog.at_level(logging.WARNING, "rllava_pl"):
        runs.trainer(tmp_path, callbacks=[table]).fit(runs.module(max_rollouts=1), runs.data(val_size=0))
    assert (
        "RolloutTable: no table is written, because the data has no validation split to take prompts from"
        in caplog.text
    )
    assert table.path is None
    assert not (tmp_path / "rollouts.html").exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rllava_pl.callbacks.rollout_table.write_text", full)
    callback, module = RolloutTable(every_n_rollouts=1, num_prompts=2), runs.module(max_rollouts=2)
    runs.trainer(tmp_path, callbacks=[callback]).fit(module, runs.data())
    assert module.state.rollouts == 2
    assert "was not written after 2 rollouts: [Errno 28] No space left on device" in caplog.text


def test_columns_of_other_prompts_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = RolloutTable(num_prompts=1, samples=0, every_n_rollouts=0)
    old = Moment(0, [Answer("x", "stop", 1.0)], [[]])
    earlier = RolloutTable(num_prompts=1)
    earlier.moments, earlier._uids = [old], ["elsewhere:0"]
    table.load_state_dict(earlier.state_dict())
    assert table.moments == [old]
    with caplog.at_level(logging.WARNING, "rllava_pl"):
        runs.trainer(tmp_path, callbacks=[table]).fit(runs.module(max_rollouts=2), runs.data())
    assert "the validation prompts are not those of the checkpoint; earlier columns are dropped" in caplog.text
    assert [moment.rollout for moment in table.moments] == [0, 2]
    assert table.moments[0] != old
    assert table.moments[0].sampled == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0; it must be at least 1"),
        ({"samples": -1}, "samples is -1 and every_n_rollouts 50; neither may be negative"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RolloutTable(**options)
