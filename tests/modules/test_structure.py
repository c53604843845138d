"""The frame of the algorithms: few attributes, options that are attributes, short files that override few hooks."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

from rllava_pl import modules
from rllava_pl.loop.updater import Updater
from rllava_pl.modules import GRPO, PolicyModule, RLModule
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.rewards import AnswerTagReward
from tests import runs

FOLDER = Path(modules.__file__).parent
BASES = {"__init__", "actor_critic", "base", "demonstrations", "policy_module", "supervised"}
LONGER = {"recipe": 67}
"""Files beside the base classes with more than 60 lines: its names of functions stand as literals in the signature."""

HOOKS = {
    "GRPO": "advantages",
    "DrGRPO": "",
    "DAPO": "",
    "RLOO": "advantages",
    "ReinforcePP": "advantages",
    "ReinforcePPBaseline": "advantages",
    "ReMax": "sample advantages",
    "OPO": "advantages policy_loss",
    "GPG": "advantages policy_loss",
    "GMPO": "policy_loss",
    "GSPO": "policy_loss",
    "ClipCov": "select policy_loss",
    "KLCov": "select policy_loss",
    "PassAtK": "advantages",
    "CISPO": "policy_loss clipped_tokens",
    "SAPO": "policy_loss",
    "Recipe": "advantages policy_loss",
    "PPO": "estimate",
    "LUFFY": "advantages policy_loss",
    "SRFT": "advantages policy_loss",
    "HPT": "advantages policy_loss",
    "CHORD": "advantages policy_loss",
    "UFT": "sample policy_loss",
    "SFT": "terms losses",
    "DPO": "terms losses evaluate_given",
}
"""What each algorithm overrides of the classes that it derives from."""
LOOP = {"training_step", "score", "compute_logprobs", "compute_advantages", "minibatches", "log_rollout", "forward"}
"""What no algorithm's file overrides."""


def instance(algorithm: type[PolicyModule], **options: object) -> PolicyModule:
    return algorithm(None, [AnswerTagReward()], **options)


def added(module: LightningModule) -> set[str]:
    """Names beside those of a LightningModule, with underscored ones, without dunders."""
    return {name for name in set(dir(module)) - set(dir(LightningModule())) if not name.startswith("__")}


def test_grpo_adds_at_most_60_names_before_and_after_a_fit(tmp_path: Path) -> None:
    module = runs.module(GRPO, max_rollouts=1)
    before = added(module)
    assert len(before) <= 60, sorted(before)
    runs.trainer(tmp_path).fit(module, runs.data())
    assert len(added(module)) <= 60, sorted(added(module) - before)


@pytest.mark.parametrize("algorithm", runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_every_option_is_an_attribute_with_its_value(algorithm: type[PolicyModule]) -> None:
    module = instance(algorithm)
    for name, parameter in inspect.signature(algorithm).parameters.items():
        value = getattr(module, name)
        if isinstance(parameter.default, int | float | str | bool):
            assert value == parameter.default, name


@pytest.mark.parametrize("algorithm", runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_signature_shows_all_options_by_name(algorithm: type[PolicyModule]) -> None:
    parameters = inspect.signature(algorithm).parameters.values()
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    names = [p.name for p in parameters]
    assert names[:2] == ["policy", "rewards"] and {"batching", "optimizer", "schedule", "seed"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("algorithm", runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_algorithm_overrides_the_hooks_of_the_table_and_not_the_loop(algorithm: type[PolicyModule]) -> None:
    inherited = {name for base in algorithm.__mro__[1:] for name in vars(base)}
    own = {name for name, x in vars(algorithm).items() if inspect.isfunction(x) and not name.startswith("__")}
    hooks = own & inherited - {"needs_groups"}
    assert hooks == set(HOOKS[algorithm.__name__].split())
    if algorithm.__module__.rpartition(".")[2] not in BASES:
        assert not hooks & LOOP


def test_table_of_hooks_has_every_algorithm() -> None:
    assert set(HOOKS) == {algorithm.__name__ for algorithm in runs.ALGORITHMS}


def test_training_step_is_defined_for_rl_and_for_supervised_methods_alone() -> None:
    files = [importlib.import_module(f"rllava_pl.modules.{path.stem}") for path in FOLDER.glob("*.py")]
    classes = {x for file in files for x in vars(file).values() if inspect.isclass(x) and issubclass(x, PolicyModule)}
    assert {cls for cls in classes if "training_step" in vars(cls)} == {RLModule, SupervisedModule}
    assert {cls for cls in classes if "compute_advantages" in vars(cls)} == {RLModule}
    assert {cls for cls in classes if "minibatches" in vars(cls)} == {PolicyModule, RLModule}
    assert not any(
        issubclass(x, Updater) and x is not Updater for file in files for x in vars(file).values() if inspect.isclass(x)
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_file_of_an_algorithm_is_short(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= (350 if path.stem in BASES else LONGER.get(path.stem, 60))
