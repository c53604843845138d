"""The command line: what it accepts, what it refuses and with which message."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace

import rllava_pl
from rllava_pl import modules
from rllava_pl.cli import COMMANDS, UsageError, configs, main
from rllava_pl.cli.app import RLCLI
from rllava_pl.cli.messages import MOVED, explain, import_class
from rllava_pl.cli.raw_config import merge, sources
from rllava_pl.cli.warnings import LOGS
from rllava_pl.loop.options import RENAMED
from rllava_pl.models import LoRA
from rllava_pl.modules import PolicyModule, RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Sampling
from tests.runs import CACHE

REPOSITORY = Path(__file__).parent.parent
COLOUR = ["fit", "--config", "tiny/colour"]
SHORT = [
    f"--model.policy.cache_dir={CACHE}",
    "--model.policy.warmup_steps=2",
    "--model.max_rollouts=2",
    "--model.schedule.warmup_steps=0",
    "--model.group_size=2",
    "--data.batch_size=4",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
]
HINT = " (RLLAVA_PL_DEBUG=1 shows the traceback)"


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLLAVA_PL_DEBUG", raising=False)


@pytest.fixture
def built(monkeypatch):
    """Parses and instantiates a command without running it."""
    monkeypatch.setattr(RLCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: main([*COLOUR, *args])


def refused(capsys, args: list[str]) -> str:
    """What stderr says when the command exits with code 2."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    return capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")


def error_of(make, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        make(*args, **kwargs)
    return str(error.value)


# -- without a Trainer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_describes_every_command_and_shows_examples(capsys, args):
    assert main(args) is None
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and what in out for name, what in COMMANDS.items())
    assert out.count("python -m rllava_pl fit --config quickstart") >= 2


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"rllava-pl {rllava_pl.__version__}\n"


def test_configs_lists_every_config_with_its_purpose(capsys):
    main(["configs"])
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in configs.names())
    assert "reads handwritten" not in out and "learns to read handwritten digits" in out


def test_configs_help_describes_the_command_and_lists_nothing(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["configs", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert out.startswith("usage: python -m rllava_pl configs") and "tiny/colour" not in out


def run_python(code: str, path: Path = REPOSITORY) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_commands_without_a_trainer_import_no_torch():
    code = """
import sys
from rllava_pl.cli import main
for args in ([], ["--version"], ["configs"], ["ftt"], ["fit", "--config", "nothing"]):
    try:
        main(args)
    except SystemExit as exit_:
        assert exit_.code == 2
assert not {"torch", "lightning", "jsonargparse", "yaml"} & set(sys.modules)
"""
    run_python(code)


def test_help_of_a_command_shows_its_options_and_links(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "--trainer.max_epochs" in out
    assert "--model.seed follows --seed_everything" in " ".join(out.split())


def test_configs_are_found_from_an_installed_wheel(tmp_path):
    # A wheel has the configs inside the package, see [tool.hatch.build.targets.wheel.force-include].
    package = tmp_path / "rllava_pl"
    shutil.copytree(REPOSITORY / "rllava_pl", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(configs.folder(), package / "configs")
    code = "from rllava_pl.cli import configs; print(*configs.names(), configs.find('configs/tiny/colour.yaml'))"
    *names, found = run_python(code, path=tmp_path).split()
    assert names == configs.names()
    assert Path(found) == package / "configs" / "tiny" / "colour.yaml"


@pytest.mark.parametrize("name", ["tiny/colour", "tiny/colour.yaml", "configs/tiny/colour.yaml", "configs/tiny/colour"])
def test_config_name_in_any_spelling_is_found(name):
    assert Path(configs.find(name)) == configs.folder() / "tiny" / "colour.yaml"


def test_file_is_preferred_to_config_of_the_same_name(tmp_path):
    (tmp_path / "quickstart").write_text("seed_everything: 3", "utf-8")
    assert configs.find("quickstart") == "quickstart"


def test_config_name_after_any_form_of_the_option_is_replaced():
    path = configs.find("quickstart")
    given_ = ["fit", "--config", "quickstart", "--config=quickstart", "-c", "quickstart", "--x", "quickstart"]
    assert configs.resolve(given_) == ["fit", "--config", path, f"--config={path}", "-c", path, "--x", "quickstart"]


# -- what is accepted -----------------------------------------------------------------------------------------------


def test_class_names_without_module_are_resolved(built):
    args = ["--model=RLOO", "--model.policy=VLM", "--model.policy.path=x", "--model.rewards+=RepetitionPenalty"]
    cli = built(*args, "--model.rewards.weight=0.5", "--data=PromptDataModule", "--trainer.callbacks+=ModelCheckpoint")
    assert type(cli.model).__name__ == "RLOO"
    assert type(cli.model.policy).__name__ == "VLM"
    rewards = [(type(reward).__name__, reward.weight) for reward in cli.model.rewards]
    assert rewards == [("AnswerTagReward", 1.0), ("RepetitionPenalty", 0.5)]
    assert type(cli.datamodule).__name__ == "PromptDataModule"
    assert "ModelCheckpoint" in [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_trainer_defaults_suit_rl(built):
    cli = built()
    config = cli.config["fit"].trainer
    assert (config.max_epochs, config.num_sanity_val_steps, config.log_every_n_steps) == (-1, 0, 1)
    assert config.use_distributed_sampler is False
    assert Path(cli.trainer.logger.log_dir) == Path("runs/tiny-colour/version_0")
    assert not cli.trainer.checkpoint_callbacks  # Lightning's count optimizer steps


@pytest.mark.parametrize(("given_", "seed"), [("7", 7), ("false", 0)])
def test_seed_everything_is_passed_to_model_and_data(built, given_, seed):
    cli = built(f"--seed_everything={given_}")
    assert (cli.model.seed, cli.datamodule.seed) == (seed, seed)


def test_random_seed_is_passed_to_model_and_data(built, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")  # what Lightning draws from
    cli = built("--seed_everything=true")
    assert (cli.model.seed, cli.datamodule.seed) == (11, 11)


def test_policy_path_is_passed_to_data(built):
    cli = built("--data=PromptDataModule", "--model.policy=VLM", "--model.policy.path=some/model")
    assert cli.datamodule.processor_path == "some/model"


def test_links_skip_classes_without_the_option(built, tmp_path, monkeypatch):
    code = "from lightning.pytorch import LightningDataModule\nclass Plain(LightningDataModule):\n    pass\n"
    (tmp_path / "plain_data.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain.yaml").write_text("data: {class_path: plain_data.Plain}", "utf-8")
    cli = built("--model.policy=VLM", "--model.policy.path=x", "--data=plain_data.Plain")
    assert type(cli.datamodule).__name__ == "Plain"


def test_printed_config_describes_the_same_run(capsys, tmp_path):
    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *args, "--print_config"])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    first = printed("--config=tiny/colour", "--model.group_size=4")
    (tmp_path / "printed.yaml").write_text(first, "utf-8")
    assert printed("--config=printed.yaml") == first
    assert "group_size: 4" in first


def test_help_of_a_class_shows_its_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--model.help", "GRPO"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "--model.scale_by_std" in out and "--model.clip.low" in out


def test_old_options_kept_by_another_class_are_accepted(built):
    cli = built("--model=RLOO")  # the config sets options of GRPO
    assert type(cli.model).__name__ == "RLOO"


# -- own defaults of an algorithm --------------------------------------------------------------------------------------

OVERRIDES = {
    "batching": ("micro_batch_size", 3),
    "clip": ("high", 0.37),
    "dynamic_sampling": ("component", "accuracy"),
    "engine_correction": ("cap", 7.5),
    "evaluation": ("samples", 5),
    "kl": ("estimator", "k2"),
    "length_penalty": ("scale", 0.75),
    "masking": ("truncated", True),
    "schedule": ("warmup_steps", 2),
}
"""One field of every group, and a value that no algorithm has as its default."""
ALGORITHMS = [cls for name in modules.__all__ if (cls := getattr(modules, name)) not in (PolicyModule, RLModule)]


def parsed(*args: str) -> Namespace:
    """The model's options as the parser of the command line understands them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PolicyModule, "model")
    policy = ["--model.policy=TinyVLM", "--model.policy.questions=[a]", "--model.policy.answers=[b]"]
    return parser.parse_args([args[0], *policy, "--model.rewards=[AnswerTagReward]", *args[1:]]).model.init_args


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda cls: cls.__name__)
def test_own_defaults_survive_partial_overrides(algorithm, tmp_path):
    name, declared = algorithm.__name__, inspect.signature(algorithm).parameters
    own = parsed(f"--model={name}")
    groups = {group: field for group, field in OVERRIDES.items() if group in declared}
    assert {"batching", "schedule", "evaluation"} <= set(groups)
    arguments = [f"--model.{group}.{field}={value}" for group, (field, value) in groups.items()]
    config = {"class_path": name, "init_args": {group: {field: value} for group, (field, value) in groups.items()}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": config}), "utf-8")
    for options in (parsed(f"--model={name}", *arguments), parsed("--config=own.yaml")):
        for group, (field, value) in groups.items():
            assert vars(options[group]) == {**vars(own[group]), field: value}


def test_class_named_on_the_command_line_has_its_own_defaults(built):
    cli = built("--config=algorithms/gspo", "--model=GSPO", "--model.clip.high=5e-4")
    assert (cli.model.clip.low, cli.model.clip.high) == (3e-4, 5e-4)


# -- what is refused --------------------------------------------------------------------------------------------------

OPTION = "has no such option"
MISTAKES = {
    "--model.epss=3": f"model.epss: GRPO {OPTION}; --model.help GRPO lists its options",
    "--model.grup_size=3": f"model.grup_size: GRPO {OPTION}; did you mean 'group_size'?",
    "--model.sampling.max_token=3": f"model.sampling.max_token: Sampling {OPTION}; did you mean 'max_tokens'?",
    "--model.clip.hihg=3": f"model.clip.hihg: Clip {OPTION}; did you mean 'high'?",
    "--model.policy.famly=llava": f"model.policy.famly: TinyVLM {OPTION}; did you mean 'family'?",
    "--model.policy.lora.rank=8": f"model.policy.lora.rank: LoRA {OPTION}; there are r, alpha, target_modules",
    "--model.optimizer.lrr=1": f"model.optimizer.lrr: AdamW {OPTION}; did you mean 'lr'?",
    "--data.batch_sise=3": f"data.batch_sise: SyntheticVisionDataModule {OPTION}; did you mean 'batch_size'?",
    "--trainer.max_epochz=3": f"trainer.max_epochz: Trainer {OPTION}; did you mean 'max_epochs'?",
    "--modle=GRPO": "modle: there is no such option; did you mean 'model'?",
    "--ckpt_pth=x": "ckpt_pth: there is no such option; did you mean 'ckpt_path'?",
    "--ckpt_path=nope.ckpt": (
        "--ckpt_path nope.ckpt: there is no such file or directory; last is the newest checkpoint"
    ),
    "--model=GRPPO": "model: no class is called 'GRPPO'; did you mean 'GRPO'?",
    "--model=Mine": (
        "model: no class is called 'Mine'; name a class of your own with its module, e.g. my_package.Mine"
    ),
    "--model=mine.Mine": "model: mine.Mine needs the module 'mine', which is not installed",
    "--model=rllava_pl.modules.GRPPO": "model: rllava_pl.modules has no 'GRPPO'; did you mean 'GRPO'?",
    "--model=torch.nn.Linear": (
        "model: Import path does not correspond to a subclass of PolicyModule, got 'torch.nn.Linear'"
    ),
    "--model.policy=TinyVLN": "model.policy: no class is called 'TinyVLN'; did you mean 'TinyVLM'?",
    "--model.rewards+=AnswrTagReward": (
        "model.rewards: no class is called 'AnswrTagReward'; did you mean 'AnswerTagReward'?"
    ),
    "--model.rewards.weight=much": "model.rewards.weight: expected float, got 'much'",
    "--model.group_size=many": "model.group_size: expected int, got 'many'",
    "--model.optimizer.lr=fast": "model.optimizer.lr: expected float or a class path, got 'fast'",
    "--model.schedule.kind=liner": (
        "model.schedule.kind: expected one of 'constant', 'linear', 'cosine', got 'liner'; did you mean 'linear'?"
    ),
    "--model.clip=fast": "model.clip: expected the options low, high, dual, got 'fast'",
    "--data.task=colour": "data.task: expected one of 'color', 'count', 'where', got 'colour'; did you mean 'color'?",
    "--data=PromptDatModule": "data: no class is called 'PromptDatModule'; did you mean 'PromptDataModule'?",
    "--trainer.callbacks+=ModelChekpoint": (
        "trainer.callbacks: no class is called 'ModelChekpoint'; did you mean 'ModelCheckpoint'?"
    ),
    "--seed_everything=abc": "seed_everything: expected bool or int, got 'abc'",
    "--trainer=x": "trainer: expected options such as max_time, got 'x'",
    "--model.group_size": "--model.group_size needs a value, e.g. --model.group_size=...",
    "extra": "'extra' is not an option; options start with --",
    "--config=quikstart": (
        "--config quikstart: there is no such file, nor a config of that name; did you mean 'quickstart'?"
    ),
    "--model.seed=3": "model.seed is '3', but it follows seed_everything, which is 1; set that instead",
}


@pytest.mark.parametrize(("argument", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistaken_argument_gives_one_line(capsys, argument, message):
    assert refused(capsys, [*COLOUR, argument]) == message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_option_of_release_0_1_gives_its_new_name(capsys, tmp_path, old, new):
    message = f"model.{old} is now model.{new}"
    assert refused(capsys, [*COLOUR, f"--model.{old}=2"]) == message
    (tmp_path / "old.yaml").write_text(f"model: {{class_path: GRPO, init_args: {{{old}: 2}}}}", "utf-8")
    assert refused(capsys, [*COLOUR, "--config=old.yaml"]) == message


def test_option_of_a_callback_of_release_0_1_gives_its_new_name(capsys):
    args = ["--trainer.callbacks+=VLLMRollout", "--trainer.callbacks.canary_every=1"]
    message = "trainer.callbacks.canary_every is now trainer.callbacks.sync_check_every"
    assert refused(capsys, [*COLOUR, *args]) == message


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_class_path_of_release_0_1_gives_its_new_path(capsys, tmp_path, old, new):
    (tmp_path / "old.yaml").write_text(f"model: {{init_args: {{optimizer: {{class_path: {old}}}}}}}", "utf-8")
    assert refused(capsys, [*COLOUR, "--config=old.yaml"]) == f"model.optimizer: {old} is now {new}"
    assert import_class(new).__name__ == new.rpartition(".")[2]


CONFIG_MISTAKES = {
    "trainr: {}": "trainr: there is no such option; did you mean 'trainer'?",
    "trainer: {loger: {}}": f"trainer.loger: Trainer {OPTION}; did you mean 'logger'?",
    "model: {init_args: {grup_size: {}}}": f"model.grup_size: GRPO {OPTION}; did you mean 'group_size'?",
    "data: {init_arg: {batch_size: 3}}": (
        f"data.init_arg: SyntheticVisionDataModule {OPTION}; did you mean 'init_args'?"
    ),
    "trainer:": "trainer: expected options such as max_time, got None",
    "model: {init_args: {rewards: [{class_path: AnswerTagReward, init_args: {wieght: 2}}]}}": (
        f"model.rewards[0].wieght: AnswerTagReward {OPTION}; did you mean 'weight'?"
    ),
    "model: {init_args: {rewards: AnswerTagReward}}": "model.rewards: expected list, got 'AnswerTagReward'",
    "trainer: {strategy: {class_path: DDPStrategyy}}": (
        "trainer.strategy: no class is called 'DDPStrategyy'; did you mean 'DDPStrategy' or 'RLDDPStrategy'?"
    ),
    "trainer: {callbacks: [EarlyStopping]}": "trainer.callbacks: EarlyStopping needs monitor",
    "model: {class_path: GRPO, init_args: {policy: {class_path: VLM, init_args: {}}}}": "model.policy: VLM needs path",
}


@pytest.mark.parametrize(("text", "message"), CONFIG_MISTAKES.items(), ids=CONFIG_MISTAKES)
def test_mistaken_config_gives_one_line(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert refused(capsys, [*COLOUR, "--config=mine.yaml"]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\nx: 1", "mine.yaml: line 2, column 5: expected ',' or ']', but got '<stream end>'"),
        ("- model", "mine.yaml: a config has sections (model, data, trainer); this is a list"),
    ],
)
def test_file_that_is_not_a_config_is_named(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert refused(capsys, ["fit", "--config", "mine.yaml"]) == message


def test_command_without_options_names_what_is_missing(capsys):
    expected = "no data and no model given; name a config (--config quickstart) or a class (--model GRPO)"
    assert refused(capsys, ["fit"]) == expected


def test_unknown_command_gives_the_nearest(capsys):
    assert refused(capsys, ["fti"]) == "'fti' is not a command; did you mean 'fit'?"
    assert refused(capsys, ["sing"]) == f"'sing' is not a command; there are {', '.join(COMMANDS)}"


def test_error_of_a_constructor_names_its_place(capsys):
    tokens = error_of(Sampling, max_tokens=0)
    assert refused(capsys, [*COLOUR, "--model.sampling.max_tokens=0"]) == f"model.{tokens}{HINT}"
    rank = error_of(LoRA, r=0)
    assert refused(capsys, [*COLOUR, "--model.policy.lora.r=0"]) == f"model.policy.{rank}{HINT}"
    weight = error_of(AnswerTagReward, weight=float("inf"))
    assert refused(capsys, [*COLOUR, "--model.rewards.weight=.inf"]) == f"model.rewards[0]: {weight}{HINT}"
    group = refused(capsys, [*COLOUR, "--model.group_size=1"])
    assert group.startswith("model: GRPO") and group.endswith(f"group_size must be >= 2, is 1{HINT}")
    assert refused(capsys, [*COLOUR, "--trainer.accelerator=cpuu"]).startswith("trainer: You selected an invalid")


def test_unusable_data_ends_the_run_before_its_first_rollout(capsys):
    data = ["--data=PromptDataModule", "--data.train=nothing.jsonl"]
    message = refused(capsys, [*COLOUR, *data, "--trainer.logger=false"])
    assert message.startswith("data file 'nothing.jsonl' does not exist") and message.endswith(HINT)


def test_debug_variable_raises_the_error_itself(monkeypatch):
    monkeypatch.setenv("RLLAVA_PL_DEBUG", "1")
    with pytest.raises(UsageError) as error:
        main([*COLOUR, "--model.group_size=1"])
    assert isinstance(error.value.__cause__, ValueError)


def test_error_during_the_run_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a fault in somebody's code")

    monkeypatch.setattr("rllava_pl.modules.GRPO.training_step", fail)  # raised outside the package
    with pytest.raises(ValueError, match="a fault in somebody's code"):
        main([*COLOUR, *SHORT])


def test_unknown_message_of_the_parser_is_one_line():
    message = 'Parser key "model":\n  Something new:\n    of two lines'
    assert explain(message, {}) == "model: Something new:"
    assert explain("something\n else", {}) == "something"


# -- config files and arguments merged ---------------------------------------------------------------------------------


def test_files_and_arguments_merge_into_one_tree(tmp_path):
    text = "model: {class_path: GRPO, init_args: {max_rollouts: 2, rewards: [A]}}"
    (tmp_path / "one.yaml").write_text(text, "utf-8")
    args = ["--config=one.yaml", "--model.init_args.group_size", "4", "--model.rewards+=B", "--model.rewards.weight=2"]
    rewards = ["A", {"class_path": "B", "weight": "2"}]
    expected = {"model": {"class_path": "GRPO", "max_rollouts": 2, "rewards": rewards, "group_size": "4"}}
    assert functools.reduce(merge, sources(args), {}) == expected


def test_another_class_keeps_the_options_given_so_far():
    old = {"model": {"class_path": "GRPO", "scale_by_std": False}}
    assert merge(old, {"model": "RLOO"}) == {"model": {"class_path": "RLOO", "scale_by_std": False}}
    assert merge(old, {"model": {"seed": 2}}) == {"model": {**old["model"], "seed": 2}}


# -- runs -------------------------------------------------------------------------------------------------------------


def test_finished_run_can_be_tested_predicted_and_resumed(capfd, tmp_path):
    args = [*SHORT, "--trainer.default_root_dir=run", "--trainer.callbacks+=RolloutCheckpoint"]
    first = main([*COLOUR, *args])
    assert first.model.state.rollouts == 2
    checkpoint = "run/checkpoints/rollout-000002.ckpt"
    saved = ["--config=run/config.yaml", f"--ckpt_path={checkpoint}", "--trainer.default_root_dir=next"]
    assert "test/reward" in main(["test", *saved]).trainer.callback_metrics
    assert "val/reward" in main(["validate", *saved]).trainer.callback_metrics
    main(["predict", *saved, "--trainer.limit_predict_batches=1"])
    lines = Path("next/predictions.jsonl").read_text("utf-8").splitlines()
    assert "text" in json.loads(lines[0])
    assert main(["fit", *saved, "--model.max_rollouts=3"]).model.state.rollouts == 3
    shown = "".join(capfd.readouterr())
    noise = [*LOGS, "Loading weights", "eval mode", "workers", "deprecated"]
    assert [word for word in noise if word in shown] == []


def test_saved_config_has_every_option(tmp_path):
    main([*COLOUR, *SHORT, "--trainer.default_root_dir=run"])
    saved = yaml.safe_load(Path("run/config.yaml").read_text("utf-8"))
    assert saved["model"]["init_args"]["group_size"] == 2
    assert saved["seed_everything"] == 1
