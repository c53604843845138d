"""Secrets in the environment and in a config are in no file that a run writes, and in no one-line error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from rllava_pl.redaction import HIDDEN, escaped, is_secret, redact
from tests import runs

ENVIRONMENT = "env-5ecret-0123456789"
CONFIG = "cfg-5ecret-9876543210"
OPTION = "opt-5ecret-abcdefghij"

SECRETIVE = '''
from rllava_pl.modules import GRPO
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Score


class Service(BaseReward):
    """A reward with a key.

    Args:
        api_key: Written into the config by mistake.
    """

    def __init__(self, api_key: str) -> None:
        super().__init__()
        self.api_key = api_key
        if api_key.startswith("bad"):
            raise ValueError(f"the key {api_key} is refused")

    def score(self, rollout):
        return Score(1.0)


class Mine(GRPO):
    """An algorithm with a token.

    Args:
        hub_token: Also a mistake.
    """

    def __init__(self, *args, hub_token: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.hub_token = hub_token
'''


def fit(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """A short run in a folder, with secrets in the environment, in a reward's option and in the algorithm's."""
    (folder / "secretive.py").write_text(SECRETIVE, "utf-8")
    service = f"{{class_path: secretive.Service, init_args: {{api_key: {CONFIG}}}}}"
    (folder / "keys.yaml").write_text(f"model: {{init_args: {{rewards: [AnswerTagReward, {service}]}}}}", "utf-8")
    given = {
        "--model": "secretive.Mine",
        "--model.hub_token": OPTION,
        "--model.scoring.isolation": "none",
        "--model.policy.warmup_steps": "40",
        "--model.policy.cache_dir": str(runs.CACHE),
        "--model.group_size": "2",
        "--model.max_rollouts": "2",
        "--model.batching.num_minibatches": "1",
        "--model.schedule.warmup_steps": "0",
        "--data.batch_size": "10",
        "--trainer.limit_val_batches": "1",
        "--trainer.callbacks+": "RolloutTable",
        "--trainer.callbacks+ ": "RolloutCheckpoint",
    } | options
    words = ["--config=tiny/colour", "--config=keys.yaml", *(f"{name.strip()}={x}" for name, x in given.items())]
    environment = os.environ | {"JUDGE_API_KEY": ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "rllava_pl", "fit", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_files_of_a_run_hold_no_secret(tmp_path: Path) -> None:
    process = fit(tmp_path)
    assert process.returncode == 0, process.stderr
    inputs = ("secretive.py", "keys.yaml")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    written = {path.name: path.read_bytes() for path in files if path.name not in inputs}
    assert {"config.yaml", "hparams.yaml", "rollouts.html", "summary.json"} <= written.keys()
    assert any(name.startswith("events.") for name in written) and any(name.endswith(".ckpt") for name in written)
    for secret in (ENVIRONMENT, CONFIG, OPTION):
        assert [name for name, content in written.items() if secret.encode() in content] == []
    assert f"api_key: '{HIDDEN}'".encode() in written["config.yaml"]


def test_one_line_errors_hold_no_secret(tmp_path: Path) -> None:
    bad = "bad-5ecret-0123456789"
    process = fit(tmp_path, **{"--model.rewards.api_key": bad})
    assert process.returncode == 2
    assert process.stderr == (
        f"error: model.rewards[1]: the key {HIDDEN} is refused (RLLAVA_PL_DEBUG=1 shows the traceback)\n"
    )
    process = fit(tmp_path, **{"--model.group_size": ENVIRONMENT})
    assert process.stderr == f"error: model.group_size: expected int, got '{HIDDEN}'\n"


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
def test_name_of_a_secret_is_recognised(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["max_tokens", "pad_token", "tokenizer", "token_mean", "key", "keys", "ngram_tokens"])
def test_other_name_is_not_a_secret(name: str) -> None:
    assert not is_secret(name)


def test_short_values_and_other_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN_TOKEN", "1234")
    monkeypatch.setenv("HOME_OF_KEYS", "/some/where")
    monkeypatch.setenv("LONG_SECRET", "12345678-and-more")
    monkeypatch.setenv("SHORTER_SECRET", "12345678")
    assert redact("1234 in /some/where: 12345678-and-more, 12345678.") == f"1234 in /some/where: {HIDDEN}, {HIDDEN}."


def test_redacted_config_keeps_its_shape_and_the_original_is_unchanged() -> None:
    config = Namespace(
        a=1, rewards=[Namespace(api_key="abcdefgh", weight=0.5)], table={"password": "ijklmnop", 3: ("x",)}
    )
    clean = redact(config)
    assert clean == Namespace(
        a=1, rewards=[Namespace(api_key=HIDDEN, weight=0.5)], table={"password": HIDDEN, 3: ("x",)}
    )
    assert config.rewards[0].api_key == "abcdefgh"
    assert redact("abcdefgh ijklmnop", config) == f"{HIDDEN} {HIDDEN}"
    assert redact("abcdefgh") == "abcdefgh"


def test_secret_option_is_not_a_hyperparameter() -> None:
    class Mine(runs.GRPO):
        def __init__(self, *args: object, api_key: str = "", **options: object) -> None:
            super().__init__(*args, **options)
            self.api_key = api_key

    module = runs.module(Mine, api_key="abcdefgh-ijkl")
    assert module.api_key == "abcdefgh-ijkl"
    assert "api_key" not in module.hparams and "api_key" not in module.hparams_initial
    assert torch.tensor(module.hparams["group_size"]) == 4


def test_values_of_any_type_below_a_secret_name_are_redacted() -> None:
    """Lists, tables and numbers too, but neither None nor a switch."""
    config = {
        "password": 987654321,
        "api_key": ["first-key-1", {"second": "second-key-2"}],
        "secret": None,
        "token": False,
    }
    assert redact(config) == {"password": HIDDEN, "api_key": HIDDEN, "secret": None, "token": False}
    assert redact("987654321 first-key-1 second-key-2", config) == " ".join([HIDDEN] * 3)


def test_secret_inside_repr_and_json_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'back\\slash"5ecret'
    monkeypatch.setenv("SOME_TOKEN", secret)
    assert redact(f"{secret!r} {json.dumps([secret])} {secret}") == f"'{HIDDEN}' [\"{HIDDEN}\"] {HIDDEN}"


def test_secret_inside_an_option_is_redacted_in_hyperparameters() -> None:
    class Mine(runs.GRPO):
        def __init__(self, *args: object, service: dict[str, str], **options: object) -> None:
            super().__init__(*args, **options)
            self.service = service

    module = runs.module(Mine, service={"api_key": "abcdefgh-ijkl", "url": "there"})
    assert module.service["api_key"] == "abcdefgh-ijkl"
    for hparams in (module.hparams, module.hparams_initial):
        assert hparams["service"] == {"api_key": HIDDEN, "url": "there"}


def test_control_and_format_characters_are_escaped() -> None:
    assert escaped("\x1b[2Jöl\n\u202e") == "\\x1b[2Jöl\\n\\u202e"
