"""Every shipped YAML parses, and every YAML of tests/conf trains; both sets are found, none is listed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from itertools import chain
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.strategies import StrategyRegistry

from rllava_pl import modules
from rllava_pl.cli import configs, main
from rllava_pl.cli.app import RLCLI
from rllava_pl.loop.options import OptionGroup
from tests.runs import CACHE

REPOSITORY = Path(__file__).parent.parent
MATRIX = sorted((REPOSITORY / "tests" / "conf").glob("*.yaml"))
SHORT = [
    "--model.policy.cache_dir=" + str(CACHE),
    "--model.sampling.max_tokens=6",
    "--model.group_size=2",
    "--model.batching.num_minibatches=2",
    "--model.max_rollouts=2",
    "--model.schedule.kind=constant",
    "--data.batch_size=4",
    "--data.val_batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=2",
    "--trainer.check_val_every_n_epoch=null",
]


def sections(name: str) -> dict[str, dict[str, object]]:
    """The config as it is written."""
    return yaml.safe_load(Path(configs.find(name)).read_text("utf-8"))


def adds_callbacks(name: str) -> bool:
    """Whether the config adds callbacks to those of the config below it."""
    return "callbacks+" in sections(name).get("trainer", {})


def is_whole(name: str) -> bool:
    """Whether the config needs no other one below it."""
    return {"model", "data", "trainer"} <= sections(name).keys()


def is_overlay(name: str) -> bool:
    """Whether the config only changes another one."""
    return not is_whole(name)


def names_a_strategy(name: str) -> bool:
    """Whether the config sets the Trainer's strategy, and nothing else."""
    return sections(name).keys() == {"trainer"} and "strategy" in sections(name)["trainer"]


def shown(part: object) -> dict[str, str]:
    """The public attributes of a part of a module, as text."""
    if not hasattr(part, "__dict__"):
        return {"": repr(part)}
    return {name: repr(value) for name, value in vars(part).items() if not name.startswith("_")}


def flat(options: dict[str, object]) -> dict[str, object]:
    """Options by name, those of a group as ``kl.loss_coef``."""
    found: dict[str, object] = {}
    for name, value in options.items():
        fields = dataclasses.asdict(value) if isinstance(value, OptionGroup) else value
        found |= {f"{name}.{key}": x for key, x in fields.items()} if isinstance(fields, dict) else {name: value}
    return found


def options_of(module: modules.PolicyModule) -> dict[str, object]:
    """What the module was made with, option groups completed with the algorithm's defaults."""
    groups = {name: value for name, value in vars(module).items() if isinstance(value, OptionGroup)}
    return flat(dict(module.hparams) | groups)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A function that parses and instantiates a command without running it."""
    monkeypatch.setattr(RLCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: main(["fit", *args, f"--trainer.default_root_dir={tmp_path}"])


@pytest.mark.parametrize("name", [name for name in configs.names() if not is_overlay(name)])
def test_shipped_config_is_instantiated(built, name):
    cli = built("--config", name)
    assert cli.model.rewards and cli.datamodule.batch_size > 0


CHANGES_MODEL = [x for x in configs.names() if sections(x).keys() == {"model"} and not x.startswith("tiny/")]
ALGORITHMS = [name for name in configs.names() if name.startswith("algorithms/")]
PRACTICE = {"algorithms/kl_cov": {"batching.num_minibatches"}}
"""Options of an overlay that differ from the class's default, with the reason in a comment there."""


@pytest.mark.parametrize("name", CHANGES_MODEL)
@pytest.mark.parametrize("below", [name for name in configs.names() if not is_overlay(name)])
def test_overlay_changes_only_what_it_names(built, below, name):
    before, after = built("--config", below), built("--config", below, "--config", name)
    named = sections(name)["model"]
    options, present = flat(named.get("init_args", {})), options_of(after.model)
    assert type(after.model).__name__ == named["class_path"]
    assert {option: present[option] for option in options} == options
    for part in ("policy", "sampling", "optimizer"):
        assert shown(getattr(after.model, part)) == shown(getattr(before.model, part))
    assert vars(after.datamodule) == vars(before.datamodule)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_overlay_of_an_algorithm_has_the_defaults_of_its_class(name):
    """Which are the paper's; values that small tasks need are in tiny/algorithms."""
    assert sections(name).keys() == {"model"}
    options = flat(sections(name)["model"]["init_args"])
    parameters = inspect.signature(getattr(modules, sections(name)["model"]["class_path"])).parameters.values()
    defaults = flat({x.name: x.default for x in parameters})
    assert {x for x in options if options[x] != defaults[x]} == PRACTICE.get(name, set())


@pytest.mark.parametrize("name", [x for x in configs.names() if x.startswith("tiny/algorithms/")])
def test_overlay_of_the_tiny_task_changes_the_algorithm_it_is_named_after(name):
    written, paper = sections(name), sections(name.removeprefix("tiny/"))
    assert written.get("model", paper["model"])["class_path"] == paper["model"]["class_path"]


@pytest.mark.parametrize("name", [x for x in configs.names() if adds_callbacks(x) and "model" not in sections(x)])
@pytest.mark.parametrize("below", [name for name in configs.names() if is_whole(name)])
def test_overlay_that_adds_callbacks_keeps_the_others(built, below, name):
    before, after = (
        cli.config.fit.trainer.callbacks
        for cli in (built("--config", below), built("--config", below, "--config", name))
    )
    (named,) = sections(name)["trainer"]["callbacks+"]
    assert [x.class_path for x in after[:-1]] == [x.class_path for x in before]
    assert after[-1].class_path.endswith(f".{named['class_path']}")
    assert {option: after[-1].init_args[option] for option in named["init_args"]} == named["init_args"]


@pytest.mark.parametrize("name", [name for name in configs.names() if names_a_strategy(name)])
def test_overlay_with_a_strategy_sets_the_trainers_strategy(built, name):
    cli, named = built("--config", "tiny/colour", "--config", name), sections(name)["trainer"]["strategy"]
    if isinstance(named, str):
        assert type(cli.trainer.strategy) is StrategyRegistry[named]["strategy"]
    else:
        assert f"rllava_pl.strategies.{type(cli.trainer.strategy).__name__}" == named["class_path"]
        assert cli.config.fit.trainer.strategy.init_args.as_dict().items() >= named["init_args"].items()


def test_misspelt_option_of_an_added_callback_is_named(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("trainer: {callbacks+: [{class_path: VLLMRollout, init_args: {contxt: 1}}]}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny/colour", "--config", str(tmp_path / "wrong.yaml")])
    assert "contxt" in capsys.readouterr().err


@pytest.mark.parametrize("name", configs.names())
def test_shipped_config_begins_with_a_line_about_its_purpose(name):
    line = Path(configs.find(name)).read_text("utf-8").splitlines()[0]
    assert line.startswith("# ") and line.endswith(".")


@pytest.mark.parametrize("path", MATRIX, ids=lambda path: path.stem)
def test_config_of_the_matrix_trains(tmp_path, path):
    cli = main(["fit", "--config", str(path), *SHORT, f"--trainer.default_root_dir={tmp_path}"])
    metrics = cli.trainer.callback_metrics
    assert cli.model.state.rollouts == 2
    assert cli.model.state.updates == 2 * 2 * cli.model.batching.update_epochs
    assert {"train/reward", "train/grad_norm", "val/reward"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_trains_from_its_overlay(tmp_path, name):
    short = [option for option in SHORT if "group_size" not in option and "minibatches" not in option]
    tuned = f"tiny/{name}"
    stack = ["tiny/colour", name, *([tuned] if tuned in configs.names() else [])]
    command = ["fit", *chain.from_iterable(("--config", each) for each in stack), *short, "--data.train_size=64"]
    cli = main([*command, f"--trainer.default_root_dir={tmp_path}"])
    metrics = cli.trainer.callback_metrics
    assert cli.model.state.rollouts == 2
    assert cli.model.state.updates == 2 * cli.model.batching.updates_per_rollout
    assert "train/grad_norm" in metrics and all(math.isfinite(value) for value in metrics.values())
