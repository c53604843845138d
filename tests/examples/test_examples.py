"""Every example runs as its page says, and does what it claims."""

from __future__ import annotations

import ast
import csv
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from examples import grpo_in_one_file, own_algorithm, own_reward
from examples.own_algorithm import Tournament
from examples.own_reward import LookalikeReward
from rllava_pl.cli import main
from rllava_pl.cli.app import RLCLI
from rllava_pl.models import VLM
from rllava_pl.modules import GRPO
from rllava_pl.types import PolicyBatch, Prompt, PromptInputs, Rollout, Segment, TrainingBatch
from tests import runs

FOLDER = Path(own_reward.__file__).parent
SCRIPTS = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
SHORT = [
    f"--model.policy.cache_dir={runs.CACHE}",
    "--model.max_rollouts=2",
    "--model.schedule.kind=constant",
    "--data.batch_size=4",
    "--trainer.callbacks=null",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs.CACHE))


def script(monkeypatch, name: str, length: int) -> None:
    """``python examples/<name> <length>``."""
    monkeypatch.setattr(sys, "argv", [name, str(length)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def command_line(module) -> RLCLI:
    """The ``python -m rllava_pl`` line of an example's docstring, shortened."""
    line = re.search(r"python -m rllava_pl (.*)", module.__doc__)[1]
    return main([*shlex.split(line), *SHORT])


def lines_of_code(path: Path, name: str) -> int:
    """Lines of a class without its docstrings, comments and blank lines."""
    (cls,) = (node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == name)
    for node in ast.walk(cls):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return len({line for node in ast.walk(cls) if hasattr(node, "lineno") for line in (node.lineno, node.end_lineno)})


# -- the page --------------------------------------------------------------------------------------------------------


def test_page_has_one_row_a_script_with_its_command():
    page = (FOLDER / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`(\S+)`\]\((\S+)\) \|.*\| `python examples/(\S+)` \|$", page, re.M)
    assert {row[0] for row in rows} == SCRIPTS
    assert all(len(set(row)) == 1 for row in rows)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_script_documents_its_command_and_imports_the_package_alone(name):
    tree = ast.parse((FOLDER / name).read_text("utf-8"))
    assert f"python examples/{name}" in ast.get_docstring(tree)
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"examples", "tests", "benchmarks"}  # only the package itself is installed


# -- own_reward.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "text", "value"),
    [
        ("7", "<answer>1</answer>", 0.5),
        ("1", "<answer>7</answer>", 0.5),
        ("7", "<answer>7</answer>", 0.0),  # AnswerTagReward pays for it
        ("7", "<answer>2</answer>", 0.0),
        ("7", "<answer>1", 0.0),
        ("17", "<answer>", 0.0),
        ("17", "", 0.0),
    ],
)
def test_lookalike_scores_half(label, text, value):
    ids = torch.zeros(1, dtype=torch.int64)
    rollout = Rollout(Prompt("a", (), answer=label), 0, PromptInputs(ids), (Segment(ids),), text=text)
    assert LookalikeReward()([rollout])[0].value == value


def test_own_reward_from_python(monkeypatch, tmp_path, capsys):
    assert lines_of_code(FOLDER / "own_reward.py", "LookalikeReward") <= 10
    script(monkeypatch, "own_reward.py", 1)
    assert "test/lookalike" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_own_reward_from_the_command_line():
    cli = command_line(own_reward)
    assert [type(reward).__name__ for reward in cli.model.rewards] == ["AnswerTagReward", "LookalikeReward"]
    assert isinstance(cli.model.rewards[1], LookalikeReward) and isinstance(cli.model, GRPO)
    assert {"train/reward_accuracy", "train/reward_lookalike"} <= set(cli.trainer.callback_metrics)


# -- own_algorithm.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def tournament() -> Tournament:
    return runs.module(Tournament)


def groups_of_four(rewards: list[float]) -> TrainingBatch:
    """What ``advantages`` and ``policy_loss`` read of a batch."""
    empty_NT, rewards_N = torch.zeros(len(rewards), 1), torch.tensor(rewards)
    return TrainingBatch(
        rollouts=(),
        inputs=(),
        group_size=4,
        group_N=torch.arange(len(rewards)) // 4,
        in_baseline_N=torch.ones(len(rewards), dtype=torch.bool),
        response_ids_NT=empty_NT.long(),
        sampled_mask_NT=empty_NT.bool(),
        trained_mask_NT=empty_NT.bool(),
        engine_logp_NT=empty_NT,
        scores_N=rewards_N,
        rewards_N=rewards_N,
        token_rewards_NT=empty_NT,
        advantages_NT=empty_NT,
    )


def test_tournament_has_at_most_ten_lines_of_code():
    assert lines_of_code(FOLDER / "own_algorithm.py", "Tournament") <= 10


def test_advantage_is_wins_minus_losses(tournament):
    """The best of four wins 3 of 4 games (one is against itself), the two equal ones win and lose one."""
    credit = tournament.advantages(groups_of_four([1.0, 0.1, 0.1, 0.0] + [0.7] * 4))
    assert credit.tolist() == [0.75, 0.0, 0.0, -0.75] + [0.0] * 4
    squared = tournament.advantages(groups_of_four([1.0, 0.01, 0.01, 0.0] + [0.49] * 4))
    assert torch.equal(squared, credit)  # only the order counts


@pytest.mark.parametrize(("advantage", "best_ratio"), [(0.5, 1.2), (-0.5, 0.8)])
def test_loss_is_lowest_at_the_border_of_the_clip_range(tournament, advantage, best_ratio):
    """d/dρ (|A|/2ε·(ρ-1)² - A·ρ) = |A|/ε·(ρ-1) - A is 0 at ρ = 1 + sign(A)·ε, and -A at ρ = 1."""
    logp = torch.tensor([[1.0], [best_ratio]]).log().requires_grad_()
    batch = groups_of_four([0.0, 0.0]).replace(advantages_NT=torch.full((2, 1), advantage))
    batch = batch.with_computed(old_logp_NT=torch.zeros(2, 1))
    tournament.policy_loss(logp, batch).sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-advantage], [0.0]]), atol=1e-6, rtol=0)


def test_own_algorithm_from_python(monkeypatch, tmp_path, capsys):
    script(monkeypatch, "own_algorithm.py", 2)
    assert "test/accuracy" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_own_algorithm_from_the_command_line():
    cli = command_line(own_algorithm)
    assert type(cli.model) is Tournament and cli.model.state.updates == 4


# -- inside_your_trainer.py ------------------------------------------------------------------------------------------


def test_inside_your_trainer_logs_checkpoints_and_calls_back(monkeypatch, tmp_path, capsys):
    script(monkeypatch, "inside_your_trainer.py", 1)
    assert "rollout 10: reward " in capsys.readouterr().out
    run = tmp_path / "lightning_logs" / "version_0"
    assert (run / "checkpoints" / "best.ckpt").is_file()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rewards = {int(row["step"]): float(row["train/reward"]) for row in rows if row["train/reward"]}
    assert list(rewards) == list(range(10)) and all(0 <= reward <= 1 for reward in rewards.values())
    rates = [float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]]
    # Two optimizer steps a rollout, 10 of warm-up: the first of rollout k (from 0) is at (2k + 1) / 10 of the peak.
    assert rates == pytest.approx([1e-4, 3e-4, 5e-4, 7e-4, 9e-4] + [1e-3] * 5)
    assert any(row["val/accuracy"] for row in rows)


# -- grpo_in_one_file.py ---------------------------------------------------------------------------------------------


def test_one_file_runs(monkeypatch, tmp_path, capsys):
    script(monkeypatch, "grpo_in_one_file.py", 2)
    assert re.findall(r"^(\w+ \w+): ", capsys.readouterr().out, re.M) == [
        "accuracy before",
        "rollout 1",
        "rollout 2",
        "accuracy after",
    ]
    assert not list(tmp_path.iterdir())
    assert len((FOLDER / "grpo_in_one_file.py").read_text("utf-8").splitlines()) < 250


def test_one_file_agrees_with_the_package(tmp_path):
    """Same model, same tokens: the package's forward, which computes each prompt once, gives the same log-probs."""
    torch.manual_seed(0)
    plain = grpo_in_one_file.load(tmp_path / "tiny")
    prompts = grpo_in_one_file.DrawnPrompts("color", "train", 2)[:]
    batch = grpo_in_one_file.rollout(plain, plain, prompts)
    policy = VLM(str(tmp_path / "tiny"))
    policy.load()
    assert set(plain.banned_ids) == set(policy.banned_ids)
    inputs = PolicyBatch(tuple(policy.encode(prompts)), grpo_in_one_file.GROUP_SIZE, batch.ids_NT, batch.mask_NT)
    with torch.no_grad():
        logp_NT = policy(inputs).logp_NT
    torch.testing.assert_close(batch.old_logp_NT[batch.mask_NT], logp_NT[batch.mask_NT], atol=1e-5, rtol=0)
    ends = [ids[mask][-1].item() for ids, mask in zip(batch.ids_NT, batch.mask_NT, strict=True) if not mask.all()]
    assert set(ends) <= set(policy.stop_ids)  # a response that is shorter than the longest ends in an end token
