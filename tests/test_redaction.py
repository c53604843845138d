"""Secrets planted in the environment and, by mistake, in a config appear in nothing that a real run writes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from rllava_pl import redaction
from rllava_pl.redaction import HIDDEN, is_secret, redact, redacted, redacted_logs
from tests import runs

ENVIRONMENT = "env-5ecret-0123456789"
CONFIG = "cfg-5ecret-9876543210"
KNOB = "knob-5ecret-abcdefghij"

LEAKY = '''
import logging
import os

from rllava_pl.modules import GRPO
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Score


class Judge(BaseReward):
    """Tells everybody its key.

    Args:
        api_key: Written into the config by mistake.
    """

    def __init__(self, api_key: str) -> None:
        super().__init__()
        self.api_key = api_key

    def score(self, rollout):
        if rollout.prompt.uid.endswith("0"):
            raise ConnectionError(f"401 for {self.api_key} and {os.environ['JUDGE_API_KEY']}")
        return Score(1.0)


class Mine(GRPO):
    """An algorithm with a key.

    Args:
        hub_token: Also a mistake.
    """

    def __init__(self, *args, hub_token: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.hub_token = hub_token

    def report(self, experience):
        super().report(experience)
        logging.getLogger("anybody").warning("token %s, key %s", self.hub_token, os.environ["JUDGE_API_KEY"])
        if self.rollout_index == 2:
            raise ValueError(f"the end of {self.hub_token} and {os.environ['JUDGE_API_KEY']}")
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that fails in its second rollout, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "leaky.py").write_text(LEAKY, "utf-8")
    options = {
        "--config": "tiny/colour",
        "--model": "leaky.Mine",
        "--model.hub_token": KNOB,
        "--model.rewards+": "leaky.Judge",
        "--model.rewards.api_key": CONFIG,
        "--model.judging.isolation": "none",
        "--model.policy.warmup_steps": "40",
        "--model.policy.cache_dir": str(runs.CACHE),
        "--model.group_size": "2",
        "--model.minibatches": "1",
        "--data.batch_size": "10",
        "--trainer.limit_val_batches": "1",
        "--trainer.callbacks+": "RolloutTable",
        "--trainer.callbacks+ ": "RolloutCheckpoint",
    }
    words = [f"{name.strip()}={value}" for name, value in options.items()]
    environment = os.environ | {"JUDGE_API_KEY": ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "rllava_pl", "fit", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    return folder, done.stdout + done.stderr


@pytest.mark.slow
def test_no_output_of_a_run_holds_a_secret(run: tuple[Path, str]) -> None:
    folder, printed = run
    written = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"}
    written |= {"printed": printed.encode()}
    assert {"config.yaml", "hparams.yaml", "rollouts.html"} <= written.keys()
    assert any(name.startswith("events.") for name in written)
    for secret in (ENVIRONMENT, CONFIG, KNOB):
        assert [name for name, content in written.items() if secret.encode() in content] == []


@pytest.mark.slow
def test_what_was_hidden_is_still_told(run: tuple[Path, str]) -> None:
    folder, printed = run
    assert f"ConnectionError: 401 for {HIDDEN} and {HIDDEN}" in printed  # a fault of a reward
    assert f"token {HIDDEN}, key {HIDDEN}" in printed  # a log
    assert f"ValueError: the end of {HIDDEN} and {HIDDEN}" in printed  # a traceback
    (config,) = folder.rglob("config.yaml")
    assert f"api_key: '{HIDDEN}'" in config.read_text("utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "openai_api_key",
        "apikey",
        "x-api-key",
        "openai_key",
        "password",
        "github_token",
        "token",
        "client_secret",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["max_tokens", "pad_token", "tokenizer", "token_mean", "key", "keys", "ngram_tokens"])
def test_names_of_other_things(name: str) -> None:
    assert not is_secret(name)


def test_short_values_and_other_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN_TOKEN", "1234")
    monkeypatch.setenv("HOME_OF_KEYS", "/some/where")
    monkeypatch.setenv("LONG_SECRET", "12345678-and-more")
    monkeypatch.setenv("SHORTER_SECRET", "12345678")
    assert redact("1234 in /some/where: 12345678-and-more, 12345678.") == f"1234 in /some/where: {HIDDEN}, {HIDDEN}."


def test_a_redacted_config_keeps_its_shape_and_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_given", set())
    config = Namespace(
        a=1, rewards=[Namespace(api_key="abcdefgh", weight=0.5)], table={"password": "ijklmnop", 3: ("x",)}
    )
    redaction.hide(config)
    clean = redacted(config)
    assert clean == Namespace(
        a=1, rewards=[Namespace(api_key=HIDDEN, weight=0.5)], table={"password": HIDDEN, 3: ("x",)}
    )
    assert config.rewards[0].api_key == "abcdefgh"
    assert redact("abcdefgh ijklmnop") == f"{HIDDEN} {HIDDEN}"


def test_a_log_record_with_an_exception(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SOME_TOKEN", "tell-nobody")
    with redacted_logs():
        try:
            raise OSError("tell-nobody")
        except OSError:
            logging.getLogger("x").exception("%d times %s", 2, "tell-nobody")
    assert "tell-nobody" not in caplog.text
    assert f"2 times {HIDDEN}" in caplog.text and f"OSError: {HIDDEN}" in caplog.text


def test_a_module_keeps_a_key_out_of_its_hyperparameters() -> None:
    class Mine(runs.GRPO):
        def __init__(self, *args: object, api_key: str = "", **options: object) -> None:
            super().__init__(*args, **options)
            self.api_key = api_key

    module = runs.module(Mine, api_key="abcdefgh-ijkl")
    assert module.api_key == "abcdefgh-ijkl"
    assert "api_key" not in module.hparams and "api_key" not in module.hparams_initial
    assert torch.tensor(module.hparams["group_size"]) == 4


def test_all_that_stands_under_a_secret_name_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, tables and numbers too; nothing and a switch are no secrets."""
    monkeypatch.setattr(redaction, "_given", set())
    config = {
        "password": 987654321,
        "api_key": ["first-key-1", {"second": "second-key-2"}],
        "secret": None,
        "token": False,
    }
    redaction.hide(config)
    assert redacted(config) == {"password": HIDDEN, "api_key": HIDDEN, "secret": None, "token": False}
    assert redact("987654321 first-key-1 second-key-2") == " ".join([HIDDEN] * 3)


def test_secrets_within_repr_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'back\\slash"5ecret'
    monkeypatch.setenv("SOME_TOKEN", secret)
    assert redact(f"{secret!r} {json.dumps([secret])} {secret}") == f"'{HIDDEN}' [\"{HIDDEN}\"] {HIDDEN}"


def test_warnings_threads_and_destructors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_TOKEN", "tell-nobody")

    class Loud:
        def __del__(self) -> None:
            raise ValueError("tell-nobody at the end")

    def fail() -> None:
        raise ValueError("tell-nobody in a thread")

    with redacted_logs():
        text = warnings.formatwarning("tell-nobody of it", UserWarning, __file__, 1)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        loud = Loud()
        del loud
    printed = text + capsys.readouterr().err
    assert "tell-nobody" not in printed
    assert all(f"{HIDDEN} {what}" in printed for what in ("of it", "in a thread", "at the end"))


def test_a_module_hides_keys_within_its_hyperparameters() -> None:
    class Mine(runs.GRPO):
        def __init__(self, *args: object, judge: dict[str, str], **options: object) -> None:
            super().__init__(*args, **options)
            self.judge = judge

    module = runs.module(Mine, judge={"api_key": "abcdefgh-ijkl", "url": "there"})
    assert module.judge["api_key"] == "abcdefgh-ijkl"
    for hparams in (module.hparams, module.hparams_initial):
        assert hparams["judge"] == {"api_key": HIDDEN, "url": "there"}


def test_escaped() -> None:
    assert redaction.escaped("\x1b[2Jöl\n\u202e") == "\\x1b[2Jöl\\n\\u202e"
