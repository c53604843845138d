"""The command line: what it understands, what it refuses and in which words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rllava_pl
from rllava_pl.cli import COMMANDS, UsageError, configs, given, main
from rllava_pl.cli.app import RLCLI
from rllava_pl.cli.explain import Place, explain
from rllava_pl.cli.quiet import LOGS
from rllava_pl.models import LoRA
from rllava_pl.modules import RLModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Sampling
from tests.runs import CACHE

REPOSITORY = Path(__file__).parent.parent
COLOUR = ["fit", "--config", "tiny/colour"]
SHORT = [
    f"--model.policy.cache_dir={CACHE}",
    "--model.policy.warmup_steps=2",
    "--model.max_rollouts=2",
    "--model.warmup_steps=0",
    "--model.group_size=2",
    "--data.batch_size=4",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
]
HINT = " (RLLAVA_PL_DEBUG=1 shows the traceback)"


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLLAVA_PL_DEBUG", raising=False)


@pytest.fixture
def built(monkeypatch):
    """Parses and instantiates a command without running it."""
    monkeypatch.setattr(RLCLI, "fit", lambda self, **kwargs: None)
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


def test_configs_are_listed_with_their_purpose(capsys):
    main(["configs"])
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in configs.names())
    assert "reads handwritten" not in out and "learns to read handwritten digits" in out


def run_python(code: str, path: Path = REPOSITORY) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_help_and_version_and_wrong_words_import_no_torch():
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


def test_help_of_a_command_imports_no_transformers_and_leaves_torchmetrics_whole():
    code = """
import sys
from rllava_pl.cli import main
try:
    main(["fit", "--help"])
except SystemExit as exit_:
    assert exit_.code == 0
assert not {"transformers", "sklearn", "pandas", "datasets", "peft"} & set(sys.modules)
from torchmetrics.functional.text import bert
assert bert.AutoTokenizer.from_pretrained.__self__.__name__ == "AutoTokenizer"
assert sys.modules["transformers"].AutoTokenizer.from_pretrained == bert.AutoTokenizer.from_pretrained
"""
    out = run_python(code)
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
def test_a_config_is_found_by_name(name):
    assert Path(configs.find(name)) == configs.folder() / "tiny" / "colour.yaml"


def test_a_file_wins_over_a_config_of_the_same_name(tmp_path):
    (tmp_path / "quickstart").write_text("seed_everything: 3", "utf-8")
    assert configs.find("quickstart") == "quickstart"


def test_names_of_configs_are_replaced_in_every_spelling():
    path = configs.find("quickstart")
    given_ = ["fit", "--config", "quickstart", "--config=quickstart", "-c", "quickstart", "--x", "quickstart"]
    assert configs.resolve(given_) == ["fit", "--config", path, f"--config={path}", "-c", path, "--x", "quickstart"]


# -- what is understood -----------------------------------------------------------------------------------------------


def test_classes_are_named_without_their_module(built):
    args = ["--model=RLOO", "--model.policy=VLM", "--model.policy.path=x", "--model.rewards+=RepetitionPenalty"]
    cli = built(*args, "--model.rewards.weight=0.5", "--data=PromptDataModule", "--trainer.callbacks+=ModelCheckpoint")
    assert type(cli.model).__name__ == "RLOO"
    assert type(cli.model.source).__name__ == "VLM"
    rewards = [(type(reward).__name__, reward.weight) for reward in cli.model.rewards]
    assert rewards == [("AnswerTagReward", 1.0), ("RepetitionPenalty", 0.5)]
    assert type(cli.datamodule).__name__ == "PromptDataModule"
    assert "ModelCheckpoint" in [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_defaults_fit_rl(built):
    cli = built()
    config = cli.config["fit"].trainer
    assert (config.max_epochs, config.num_sanity_val_steps, config.log_every_n_steps) == (-1, 0, 1)
    assert config.use_distributed_sampler is False
    assert Path(cli.trainer.logger.log_dir) == Path("runs/tiny-colour/version_0")
    assert not cli.trainer.checkpoint_callbacks  # Lightning's count optimizer steps


@pytest.mark.parametrize(("given_", "seed"), [("7", 7), ("false", 0)])
def test_one_seed_reaches_model_and_data(built, given_, seed):
    cli = built(f"--seed_everything={given_}")
    assert (cli.model.seed, cli.datamodule.seed) == (seed, seed)


def test_a_seed_that_is_drawn_reaches_model_and_data(built, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")  # what Lightning draws from
    cli = built("--seed_everything=true")
    assert (cli.model.seed, cli.datamodule.seed) == (11, 11)


def test_the_policy_measures_the_prompts_of_the_data(built):
    cli = built("--data=PromptDataModule", "--model.policy=VLM", "--model.policy.path=some/model")
    assert cli.datamodule.processor_path == "some/model"


def test_links_break_no_class_that_lacks_the_option(built, tmp_path, monkeypatch):
    code = "from lightning.pytorch import LightningDataModule\nclass Plain(LightningDataModule):\n    pass\n"
    (tmp_path / "plain_data.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain.yaml").write_text("data: {class_path: plain_data.Plain}", "utf-8")
    cli = built("--model.policy=VLM", "--model.policy.path=x", "--data=plain_data.Plain")
    assert type(cli.datamodule).__name__ == "Plain"


def test_what_print_config_prints_is_a_config_of_the_same_run(capsys, tmp_path):
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
    assert "--model.scale_by_std" in capsys.readouterr().out


# -- what is refused --------------------------------------------------------------------------------------------------

OPTION = "has no such option"
MISTAKES = {
    "--model.epss=3": f"model.epss: GRPO {OPTION}; did you mean 'epochs'?",
    "--model.sampling.max_token=3": "model.sampling.max_token: there is no such option; did you mean 'max_tokens'?",
    "--model.policy.famly=llava": f"model.policy.famly: TinyVLM {OPTION}; did you mean 'family'?",
    "--model.policy.lora.rank=8": f"model.policy.lora.rank: LoRA {OPTION}; there are r, alpha, target_modules",
    "--model.optimizer.lrr=1": f"model.optimizer.lrr: AdamW {OPTION}; did you mean 'lr'?",
    "--data.batch_sise=3": f"data.batch_sise: SyntheticVisionDataModule {OPTION}; did you mean 'batch_size'?",
    "--trainer.max_epochz=3": ("trainer.max_epochz: there is no such option; did you mean 'max_epochs'?"),
    "--modle=GRPO": "modle: there is no such option; did you mean 'model'?",
    "--ckpt_pth=x": "ckpt_pth: there is no such option; did you mean 'ckpt_path'?",
    "--model=GRPPO": "model: no class is called 'GRPPO'; did you mean 'GRPO'?",
    "--model=Mine": (
        "model: no class is called 'Mine'; name a class of your own with its module, e.g. my_package.Mine"
    ),
    "--model=mine.Mine": "model: there is no module 'mine', which 'mine.Mine' names; is it installed?",
    "--model=rllava_pl.modules.GRPPO": "model: rllava_pl.modules has no 'GRPPO'; did you mean 'GRPO'?",
    "--model=torch.nn.Linear": "model: torch.nn.Linear is no RLModule",
    "--model.policy=TinyVLN": "model.policy: no class is called 'TinyVLN'; did you mean 'TinyVLM'?",
    "--model.rewards+=AnswrTagReward": (
        "model.rewards: no class is called 'AnswrTagReward'; did you mean 'AnswerTagReward'?"
    ),
    "--model.rewards.weight=much": "model.rewards.weight: expected a number, got 'much'",
    "--model.group_size=many": "model.group_size: expected an integer, got 'many'",
    "--model.optimizer.lr=fast": "model.optimizer.lr: expected a number, got 'fast'",
    "--model.lr_schedule=liner": (
        "model.lr_schedule: 'liner' is none of constant, linear, cosine; did you mean 'linear'?"
    ),
    "--data.task=colour": "data.task: 'colour' is none of color, count, where; did you mean 'color'?",
    "--data=PromptDatModule": "data: no class is called 'PromptDatModule'; did you mean 'PromptDataModule'?",
    "--trainer.callbacks+=ModelChekpoint": (
        "trainer.callbacks: no class is called 'ModelChekpoint'; did you mean 'ModelCheckpoint'?"
    ),
    "--seed_everything=abc": "seed_everything: expected true or false or an integer, got 'abc'",
    "--trainer=x": "trainer: expected options such as max_time, got 'x'",
    "--model.group_size": "--model.group_size needs a value, e.g. --model.group_size=...",
    "extra": "'extra' belongs to no option; options start with --",
    "--config=quikstart": (
        "--config quikstart: there is no such file, nor a config of that name; did you mean 'quickstart'?"
    ),
    "--model.seed=3": "model.seed is '3', but it follows seed_everything, which says 1; set that instead",
}


@pytest.mark.parametrize(("argument", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistaken_argument_is_answered_in_one_line(capsys, argument, message):
    known = message.replace("GRPO, RLOO", ", ".join(sorted({cls.__name__ for cls in subclasses(RLModule)})))
    assert refused(capsys, [*COLOUR, argument]) == known


def subclasses(base: type) -> set[type]:
    """All of them, also those of examples that ran before in this process: they can be named as well."""
    return {cls for child in base.__subclasses__() for cls in {child, *subclasses(child)}}


CONFIG_MISTAKES = {
    "trainr: {}": "trainr: there is no such option; did you mean 'trainer'?",
    "trainer: {loger: {}}": "trainer.loger: there is no such option; did you mean 'logger'?",
    "model: {init_args: {grup_size: {}}}": "model.grup_size: there is no such option; did you mean 'group_size'?",
    "data: {init_arg: {batch_size: 3}}": (
        f"data.init_arg: SyntheticVisionDataModule {OPTION}; did you mean 'init_args'?"
    ),
    "trainer:": "trainer: expected options such as max_time, got None",
    "model: {init_args: {rewards: [{class_path: AnswerTagReward, init_args: {wieght: 2}}]}}": (
        f"model.rewards.wieght: AnswerTagReward {OPTION}; did you mean 'weight'?"
    ),
    "model: {init_args: {rewards: AnswerTagReward}}": "model.rewards: expected a list, got 'AnswerTagReward'",
    "trainer: {strategy: {class_path: DDPStrategyy}}": (
        "trainer.strategy: no class is called 'DDPStrategyy'; did you mean 'DDPStrategy' or 'RLDDPStrategy'?"
    ),
    "trainer: {callbacks: [EarlyStopping]}": "trainer.callbacks: EarlyStopping needs monitor",
    "model: {class_path: GRPO, init_args: {policy: {class_path: VLM, init_args: {}}}}": "model.policy: VLM needs path",
}


@pytest.mark.parametrize(("text", "message"), CONFIG_MISTAKES.items(), ids=CONFIG_MISTAKES)
def test_a_mistaken_config_is_answered_in_one_line(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert refused(capsys, [*COLOUR, "--config=mine.yaml"]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\nx: 1", "mine.yaml: line 2, column 5: expected ',' or ']', but got '<stream end>'"),
        ("- model", "mine.yaml: a config has sections (model, data, trainer); this is a list"),
    ],
)
def test_a_file_that_is_no_config_is_named(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert refused(capsys, ["fit", "--config", "mine.yaml"]) == message


def test_a_command_without_anything_says_what_to_give(capsys):
    expected = "no data and no model given; name a config (--config quickstart) or a class (--model GRPO)"
    assert refused(capsys, ["fit"]) == expected


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert refused(capsys, ["fti"]) == "'fti' is no command; did you mean 'fit'?"
    assert refused(capsys, ["sing"]) == f"'sing' is no command; there are {', '.join(COMMANDS)}"


def test_what_a_constructor_refuses_comes_with_its_place(capsys):
    tokens = error_of(Sampling, max_tokens=0)
    assert refused(capsys, [*COLOUR, "--model.sampling.max_tokens=0"]) == f"model.{tokens}{HINT}"
    rank = error_of(LoRA, r=0)
    assert refused(capsys, [*COLOUR, "--model.policy.lora.r=0"]) == f"model.policy.{rank}{HINT}"
    weight = error_of(AnswerTagReward, weight=float("inf"))
    assert refused(capsys, [*COLOUR, "--model.rewards.weight=.inf"]) == f"model.rewards[0]: {weight}{HINT}"
    group = refused(capsys, [*COLOUR, "--model.group_size=1"])
    assert group.startswith("model: GRPO") and group.endswith(f"group_size must be >= 2, is 1{HINT}")
    assert refused(capsys, [*COLOUR, "--trainer.accelerator=cpuu"]).startswith("trainer: You selected an invalid")


def test_data_that_cannot_be_used_end_the_run_before_its_first_rollout(capsys):
    data = ["--data=PromptDataModule", "--data.train=nothing.jsonl"]
    message = refused(capsys, [*COLOUR, *data, "--trainer.logger=false"])
    assert message.startswith("data file 'nothing.jsonl' does not exist") and message.endswith(HINT)


def test_the_error_itself_is_raised_for_those_who_debug(monkeypatch):
    monkeypatch.setenv("RLLAVA_PL_DEBUG", "1")
    with pytest.raises(UsageError) as error:
        main([*COLOUR, "--model.group_size=1"])
    assert isinstance(error.value.__cause__, ValueError)


def test_an_error_of_the_run_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a fault in somebody's code")

    monkeypatch.setattr("rllava_pl.modules.GRPO.training_step", fail)  # raised outside the package
    with pytest.raises(ValueError, match="a fault in somebody's code"):
        main([*COLOUR, *SHORT])


def test_a_message_in_no_known_form_is_passed_on_in_one_line():
    message = 'Parser key "model":\n  Something new:\n    of two lines'
    assert explain(message, Place({}, {})) == "model: Something new:"
    assert explain("something\n else", Place({}, {})) == "something"


# -- what was given ---------------------------------------------------------------------------------------------------


def test_arguments_and_files_become_one_tree(tmp_path):
    text = "model: {class_path: GRPO, init_args: {epochs: 2, rewards: [A]}}"
    (tmp_path / "one.yaml").write_text(text, "utf-8")
    args = ["--config=one.yaml", "--model.init_args.group_size", "4", "--model.rewards+=B", "--model.rewards.weight=2"]
    rewards = ["A", {"class_path": "B", "weight": "2"}]
    expected = {"model": {"class_path": "GRPO", "epochs": 2, "rewards": rewards, "group_size": "4"}}
    assert given.collect(args) == expected


def test_another_class_starts_afresh():
    old = {"model": {"class_path": "GRPO", "scale_by_std": False}}
    assert given.merge(old, {"model": {"class_path": "RLOO"}}) == {"model": {"class_path": "RLOO"}}
    assert given.merge(old, {"model": {"epochs": 2}}) == {"model": {**old["model"], "epochs": 2}}


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_can_be_tested_predicted_and_continued_from_what_it_left(capfd, tmp_path):
    args = [*SHORT, "--trainer.default_root_dir=run", "--trainer.callbacks+=RolloutCheckpoint"]
    first = main([*COLOUR, *args])
    assert first.model.rollout_index == 2
    checkpoint = "run/checkpoints/rollout-000002.ckpt"
    saved = ["--config=run/config.yaml", f"--ckpt_path={checkpoint}", "--trainer.default_root_dir=next"]
    assert "test/reward" in main(["test", *saved]).trainer.callback_metrics
    assert "val/reward" in main(["validate", *saved]).trainer.callback_metrics
    main(["predict", *saved, "--trainer.limit_predict_batches=1"])
    lines = Path("next/predictions.jsonl").read_text("utf-8").splitlines()
    assert "text" in json.loads(lines[0])
    assert main(["fit", *saved, "--model.max_rollouts=3"]).model.rollout_index == 3
    shown = "".join(capfd.readouterr())
    noise = [*LOGS, "Loading weights", "eval mode", "workers", "deprecated"]
    assert [word for word in noise if word in shown] == []


def test_a_saved_config_has_every_option(tmp_path):
    main([*COLOUR, *SHORT, "--trainer.default_root_dir=run"])
    saved = yaml.safe_load(Path("run/config.yaml").read_text("utf-8"))
    assert saved["model"]["init_args"]["group_size"] == 2
    assert saved["seed_everything"] == 1
