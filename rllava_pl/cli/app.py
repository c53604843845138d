"""The subcommands that need a Trainer, as a ``LightningCLI``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import cast

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

# Classes of these packages can be named without their module because they are imported here.
import rllava_pl.datamodules
import rllava_pl.models
import rllava_pl.rewards
import rllava_pl.strategies  # noqa: F401
from rllava_pl.callbacks import RolloutCheckpoint, RolloutWriter
from rllava_pl.callbacks.files import shown
from rllava_pl.checkpoint.manifest import DamagedCheckpoint
from rllava_pl.cli import TRAINER_COMMANDS
from rllava_pl.cli.errors import UsageError, debugging, raised_by_us, with_hint
from rllava_pl.cli.messages import check_keys, explain, import_class, unknown_option
from rllava_pl.cli.raw_config import CLASS, OPTIONS, Tree, Value, lookup, merge, sources
from rllava_pl.modules import PolicyModule
from rllava_pl.redaction import redact

TRAINER_DEFAULTS: Tree = {
    "max_epochs": -1,  # a run ends with max_rollouts, not with a number of passes over the prompts
    "num_sanity_val_steps": 0,  # sampling answers only to throw them away takes as long as a rollout
    "log_every_n_steps": 1,  # a step is a rollout, seconds to minutes long
    "use_distributed_sampler": False,  # the data modules shard by themselves, and exactly
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
    },
}
CALLBACKS: list[Value] = [
    {"class_path": f"rllava_pl.callbacks.{name}"}
    for name in ("RolloutProgressBar", "RolloutCheckpoint", "Watchdog", "MemoryReport")
]
"""Callbacks of a run whose config names none."""
LINKS = {
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.processor_path": "model.policy.path",
}
"""Options that take the value of another one, where the class has them: target and source."""
SECTIONS = {"model": PolicyModule, "data": LightningDataModule, "trainer": Trainer}
"""Sections of a config that hold a class."""
LIGHTNING_PATHS = ("last", "best", "hpc")
"""Values of ``ckpt_path`` that Lightning resolves."""


class SavedConfig(SaveConfigCallback):
    """Saves the config beside the logs, without secrets."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, overwrite: bool = True) -> None:
        super().__init__(parser, redact(config), overwrite=overwrite)


class RLCLI(LightningCLI):
    """One command from arguments to the end of the run.

    Args:
        args: Subcommand and options, names of configs replaced by their files. A mistake in them is a ``UsageError``.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command = args[0]
        self.raw: Tree = {"trainer": {**TRAINER_DEFAULTS, "callbacks": CALLBACKS}}  # the user's are merged into it
        strict = {"exit_on_error": False, "allow_abbrev": False}  # raise, so that the message can be shortened
        followers = ", ".join(f"--{target} follows --{source}" for target, source in LINKS.items())
        about = f"{TRAINER_COMMANDS[self.command].capitalize()}. Where a class has them, {followers}."
        try:
            super().__init__(
                PolicyModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=SavedConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,  # the same command gives the same run
                parser_kwargs={"prog": "python -m rllava_pl", **strict, self.command: {"description": about, **strict}},
                args=list(args),
            )
        except UsageError as error:
            raise UsageError(redact(str(error), self.raw)) from error.__cause__

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the instance
        """The one command of this run; parsers of the others would cost start-up time."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        help_ = "Of Python, NumPy, torch, model and data; false seeds nothing, true takes PL_GLOBAL_SEED or 0."
        parser.add_argument("--seed_everything", type=bool | int, default=self.seed_everything_default, help=help_)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set default callbacks, and link the seed and the policy's path to the options that need them."""
        parser.set_defaults({"trainer.callbacks": CALLBACKS})
        for target, source in LINKS.items():
            parser.link_arguments(_full(source), _full(target), _seed_of if source == "seed_everything" else None)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; an unknown key, a wrong value or a contradiction is a ``UsageError``."""
        args = cast("list[str]", args)
        known = list(self._parser(self.command).get_defaults().as_dict())
        for source in sources(args[1:]):
            self.raw = cast(Tree, merge(self.raw, source))
            for name, section in source.items():
                if name not in known:
                    raise UsageError(unknown_option(name, known))
                if name == "trainer" and not isinstance(section, dict) and not Path(str(section)).is_file():
                    raise UsageError(f"trainer: expected options such as max_time, got {section!r}")
                if name in SECTIONS:
                    check_keys(section, self.raw[name], SECTIONS[name], name)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if debugging():
                raise
            raise UsageError(explain(str(error), self.raw)) from error
        parsed = self.config[self.command]
        for target, origin in LINKS.items():
            asked = lookup(self.raw, target.split("."))
            if asked is not None and str(asked) != str(got := parsed.get(_full(target), asked)):
                raise UsageError(f"{target} is {asked!r}, but it follows {origin}, which is {got!r}; set that instead")
        path = parsed.get("ckpt_path")
        if path is not None and path not in LIGHTNING_PATHS and ":" not in path and not Path(path).exists():
            raise UsageError(f"--ckpt_path {path}: there is no such file or directory; last is the newest checkpoint")

    def before_instantiate_classes(self) -> None:
        """Pass on a seed that was drawn at random (``seed_everything: true``); others are passed by their link."""
        config = self.config[self.subcommand]
        for section in (config.model, config.data):
            if section is not None and "seed" in section.get("init_args", {}):
                section.init_args.seed = _seed_of(config.seed_everything)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; an error of a constructor names its place in the config."""
        try:
            self.build()
        except (ValueError, OSError, ImportError, MisconfigurationException) as error:
            origin: BaseException = error  # behind the errors that the parser makes of it
            while isinstance(origin, ValueError) and origin.__cause__ is not None:
                origin = origin.__cause__
            raise UsageError(with_hint(f"{_place(origin, self.config[self.subcommand])}{origin}")) from error

    def build(self) -> None:
        """Everything that the config describes; overridden by commands that need only part of it."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A Trainer without Lightning's own checkpoints, which count optimizer steps, unless a callback saves some."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        if config.enable_checkpointing is None:
            kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: options come from the config, so that a run can be resumed with others, e.g. more rollouts."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; errors of this package before the first metric become one line, others keep their traceback."""
        kwargs = self._prepare_subcommand_kwargs(subcommand)
        callbacks = cast("list[Callback]", self.trainer.callbacks)  # type: ignore[attr-defined]
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True  # loading a checkpoint must not run code
        if subcommand == "predict":  # answers are written to a file instead of kept in memory
            kwargs["return_predictions"] = False
            if not any(isinstance(callback, RolloutWriter) for callback in callbacks):
                callbacks.append(RolloutWriter())
        saver = next((callback for callback in callbacks if isinstance(callback, RolloutCheckpoint)), None)
        if kwargs.get("ckpt_path") == "last" and saver is not None:  # else Lightning looks for its checkpoints
            kwargs["ckpt_path"] = self._last_checkpoint(saver)
        try:
            getattr(self.trainer, subcommand)(**kwargs)
        except (ValueError, OSError, ImportError) as error:
            if raised_by_us(error) and not self.trainer.callback_metrics:
                raise UsageError(with_hint(str(error))) from error
            raise

    def _last_checkpoint(self, saver: RolloutCheckpoint) -> str | None:
        """The newest complete checkpoint; None, with which ``fit`` starts a new run, if there is none yet."""
        try:
            found = saver.newest(self.trainer)
        except DamagedCheckpoint as error:
            raise UsageError(str(error)) from error
        if found is None and self.command != "fit":
            raise UsageError(f"--ckpt_path last: there is no checkpoint in {shown(saver.directory(self.trainer))} yet")
        rank_zero_info(f"--ckpt_path last: {shown(found) if found else 'no checkpoint yet, starting a new run'}")
        return found


class PartialCLI(RLCLI):
    """Reads a config of ``fit``, builds part of it and runs nothing."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(["fit", *args])

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def _full(option: str) -> str:
    """``model.policy.path`` -> ``model.init_args.policy.init_args.path``."""
    return option.replace(".", f".{OPTIONS}.")


def _seed_of(seed_everything: bool | int) -> int:
    """0, the default of modules and data, if no number is given; a random seed is passed on once it is drawn."""
    return 0 if isinstance(seed_everything, bool) else seed_everything


def _place(error: BaseException, config: Namespace) -> str:
    """Place of an error of a constructor: ``model.policy.`` before ``lora.r is 0``, else ``model.rewards[0]: ``."""
    objects = dict(_objects(config))
    option = str(error).partition(" ")[0]
    homes = [key.removesuffix(option) for key in objects if key.endswith(f".{option}")]
    if len(homes) == 1:
        return homes[0]
    places = {cls: f"{key}: " for key, cls in objects.items() if cls} | {Trainer: "trainer: "}
    found = ""
    for frame, _ in walk_tb(error.__traceback__):  # towards the frame that raised
        found = places.get(type(frame.f_locals.get("self")), found)
    return found


def _objects(section: object, path: str = "") -> Iterator[tuple[str, type | None]]:
    """Every option of a parsed config, with its class if it is an object."""
    if isinstance(section, list):
        for k, item in enumerate(section):
            yield from _objects(item, f"{path}[{k}]")
        return
    fields = vars(section) if isinstance(section, Namespace) else {}
    class_path = fields.get(CLASS)
    yield path, import_class(class_path) if class_path else None
    for key, value in (vars(fields.get(OPTIONS, Namespace())) if class_path else fields).items():
        yield from _objects(value, f"{path}.{key}".lstrip("."))
