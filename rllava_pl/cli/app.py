"""The subcommands that need a Trainer, as a ``LightningCLI``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

# Classes of these rooms can be named without their module because they are imported here.
import rllava_pl.datamodules
import rllava_pl.models
import rllava_pl.rewards
import rllava_pl.strategies  # noqa: F401
from rllava_pl.callbacks import RolloutCheckpoint, RolloutWriter
from rllava_pl.callbacks.files import shown
from rllava_pl.checkpoint.manifest import DamagedCheckpoint
from rllava_pl.cli import TRAINER_COMMANDS, given
from rllava_pl.cli.errors import UsageError, debugging, raised_by_us, with_hint
from rllava_pl.cli.explain import Place, explain, unknown_option
from rllava_pl.cli.names import import_class
from rllava_pl.cli.quiet import quiet
from rllava_pl.modules import RLModule
from rllava_pl.redaction import hide, redacted, redacted_logs

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # a run ends with max_rollouts, not with a number of passes over the prompts
    "num_sanity_val_steps": 0,  # sampling answers only to throw them away takes as long as a rollout
    "log_every_n_steps": 1,  # a step is a rollout, seconds to minutes long
    "use_distributed_sampler": False,  # the data modules shard by themselves, and exactly
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
    },
}
CALLBACKS = [
    {"class_path": f"rllava_pl.callbacks.{name}"}
    for name in ("RolloutProgressBar", "RolloutCheckpoint", "Watchdog", "MemoryReport")
]
"""Callbacks of a run whose config names none."""
LINKS = {
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.processor_path": "model.policy.path",
}
"""Options that follow another one, where the class has them: target and source."""
ROOTS = {"model": RLModule, "data": LightningDataModule}


class SavedConfig(SaveConfigCallback):
    """The config beside the logs, without the secrets that somebody may have put into it."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, overwrite: bool = True) -> None:
        super().__init__(parser, cast(Namespace, redacted(config)), overwrite=overwrite)


class RLCLI(LightningCLI):
    """One command from arguments to the end of the run.

    Args:
        args: Subcommand and options, config names already resolved.

    Raises:
        UsageError: The arguments or a config are wrong, a constructor refuses its options, or a run cannot start.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command = args[0]
        strict = {"exit_on_error": False, "allow_abbrev": False}  # raise, so that the message can be made readable
        followers = ", ".join(f"--{target} follows --{source}" for target, source in LINKS.items())
        about = f"{TRAINER_COMMANDS[self.command].capitalize()}. Where a class has them, {followers}."
        super().__init__(
            RLModule,
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the instance
        """The one that was asked for; the others would only cost start-up time."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed."""
        help_ = "Of Python, NumPy, torch, model and data; false seeds nothing, true takes PL_GLOBAL_SEED or 0."
        parser.add_argument("--seed_everything", type=bool | int, default=self.seed_everything_default, help=help_)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Default callbacks; one seed for everything; the policy's processor for data that measure prompts."""
        parser.set_defaults({"trainer.callbacks": CALLBACKS})
        for target, source in LINKS.items():
            compute = _seed_of if source == "seed_everything" else None
            parser.link_arguments(_full(source), _full(target), compute_fn=compute)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, refuse what was not understood, and say so in one line."""
        args = cast("list[str]", args)
        tree = given.collect(args[1:])
        options = [str(key) for key in self._parser(args[0]).get_defaults().keys()]  # noqa: SIM118 - its keys() are dotted
        _check_sections(tree, sorted({option.split(".")[0] for option in options}))
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if debugging():
                raise
            raise UsageError(explain(str(error), Place(tree, ROOTS, options))) from error
        hide(self.config)
        parsed = self.config[self.config.subcommand]
        for path, known in given.unknown(tree, parsed):
            raise UsageError(unknown_option(path, known))
        _check_links(tree, parsed)

    def before_instantiate_classes(self) -> None:
        """Hand on a seed that was drawn just now (``seed_everything: true``); the others came with their link."""
        config = self.config[self.subcommand]
        if isinstance(config.seed_everything, bool):
            return
        for section in (config.model, config.data):
            if section is not None and "seed" in section.get("init_args", {}):
                section.init_args.seed = config.seed_everything

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a constructor refuses is told with its place in the config."""
        try:
            self.build()
        except (ValueError, OSError, ImportError, MisconfigurationException) as error:
            origin = _origin(error)
            where = _where(origin, self.config[self.subcommand])
            raise UsageError(with_hint(f"{where}{origin}")) from error

    def build(self) -> None:
        """Everything the config describes; a command that needs less of it builds less."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A Trainer without Lightning's checkpoints, which count optimizer steps, unless a callback asks for them."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        if config.enable_checkpointing is None:
            kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """The config decides, not the checkpoint: resuming with other options, e.g. more rollouts, is meant."""

    # -- the subcommands ---------------------------------------------------------------------------------------------

    def fit(self, **kwargs: object) -> None:
        """``Trainer.fit``."""
        self._run("fit", kwargs)

    def validate(self, **kwargs: object) -> None:
        """``Trainer.validate``."""
        self._run("validate", kwargs)

    def test(self, **kwargs: object) -> None:
        """``Trainer.test``."""
        self._run("test", kwargs)

    def predict(self, **kwargs: object) -> None:
        """``Trainer.predict``, the answers written to a file instead of kept in memory."""
        callbacks = cast("list[Callback]", self.trainer.callbacks)  # type: ignore[attr-defined]
        if not any(isinstance(callback, RolloutWriter) for callback in callbacks):
            callbacks.append(RolloutWriter())
        self._run("predict", {**kwargs, "return_predictions": False})

    def _run(self, subcommand: str, kwargs: dict[str, object]) -> None:
        """Run; our own refusals before anything was measured are told in one line, other errors with a traceback."""
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True  # a checkpoint is data and must not run code; ours need none
        if kwargs.get("ckpt_path") == "last":
            kwargs["ckpt_path"] = self._last_checkpoint(subcommand)
        try:
            getattr(self.trainer, subcommand)(**kwargs)
        except (ValueError, OSError, ImportError) as error:
            if raised_by_us(error) and not self.trainer.callback_metrics:
                raise UsageError(with_hint(str(error))) from error
            raise

    def _last_checkpoint(self, subcommand: str) -> str | None:
        """The newest whole checkpoint of ``RolloutCheckpoint``; None, if there is none, begins a training anew.

        Raises:
            UsageError: None is whole, or there is none for a command that needs one.
        """
        callbacks = cast("list[Callback]", self.trainer.callbacks)  # type: ignore[attr-defined]
        ours = next((callback for callback in callbacks if isinstance(callback, RolloutCheckpoint)), None)
        if ours is None:  # Lightning knows what "last" is for its own callbacks
            return "last"
        try:
            found = ours.newest(self.trainer)
        except DamagedCheckpoint as error:
            raise UsageError(str(error)) from error
        if found is None and subcommand != "fit":
            raise UsageError(f"--ckpt_path last: there is no checkpoint in {shown(ours.directory(self.trainer))} yet")
        rank_zero_info("--ckpt_path last: " + ("no checkpoint yet, starting anew" if found is None else shown(found)))
        return found


def run(args: Sequence[str]) -> RLCLI:
    """Parse, build and run.

    Raises:
        UsageError: As ``RLCLI``.
    """
    with quiet(), redacted_logs():
        return RLCLI(args)


def _full(option: str) -> str:
    """``model.policy.path`` -> ``model.init_args.policy.init_args.path``."""
    return option.replace(".", ".init_args.")


def _seed_of(seed_everything: bool | int) -> int:
    """0, the default of modules and data, if no seed was named; a random one is handed on when it has been drawn."""
    return 0 if isinstance(seed_everything, bool) else seed_everything


def _check_sections(tree: given.Tree, known: Sequence[str]) -> None:
    """The top level, where the parser would ignore an unknown section if it is empty.

    Raises:
        UsageError: There is an unknown section, or one with nothing in it.
    """
    for name, section in tree.items():
        if name not in known:
            raise UsageError(unknown_option((name,), list(known)))
        if name == "trainer" and not isinstance(section, dict) and not Path(str(section)).is_file():
            raise UsageError(f"trainer: expected options such as max_time, got {section!r}")


def _check_links(tree: given.Tree, parsed: Namespace) -> None:
    """An option that follows another one must not be given another value, which would be ignored.

    Raises:
        UsageError: It was.
    """
    for target, source in LINKS.items():
        asked = given.lookup(tree, target.split("."))
        if asked is not None and str(asked) != str(got := parsed.get(_full(target), asked)):
            raise UsageError(f"{target} is {asked!r}, but it follows {source}, which says {got!r}; set that instead")


def _origin(error: BaseException) -> BaseException:
    """The error behind what the parser made of it."""
    while isinstance(error, ValueError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _where(error: BaseException, config: Namespace) -> str:
    """Place of what a constructor refused: ``model.policy.`` before ``lora.r is 0``, else ``model.rewards[0]: ``."""
    objects = dict(_walk(config))
    option = str(error).split(" ")[0]
    homes = [key.removesuffix(option) for key in objects if key.endswith(f".{option}")]
    if len(homes) == 1:
        return homes[0]
    places = {name: f"{key}: " for key, name in objects.items() if name}
    places[f"{Trainer.__module__}.{Trainer.__qualname__}"] = "trainer: "
    traceback, found = error.__traceback__, ""
    while traceback is not None:  # towards the place where it was raised
        owner = type(traceback.tb_frame.f_locals.get("self"))
        found, traceback = places.get(f"{owner.__module__}.{owner.__qualname__}", found), traceback.tb_next
    return found


def _walk(section: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the config, with the full name of the class if it holds an object."""
    if isinstance(section, list):
        for k, item in enumerate(section):
            yield from _walk(item, f"{path}[{k}]")
        return
    class_path = section.get(given.CLASS) if isinstance(section, Namespace) else None
    cls = import_class(class_path) if class_path else None
    yield path, f"{cls.__module__}.{cls.__qualname__}" if cls else ""
    if isinstance(section, Namespace):
        for key, value in given.children(section).items():
            yield from _walk(value, f"{path}.{key}".lstrip("."))
