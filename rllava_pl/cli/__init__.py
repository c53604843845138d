"""The command line: ``python -m rllava_pl fit|validate|test|predict|check-data|plan|configs``.

``--version``, ``--help``, ``configs`` and a mistyped command or config name import no torch, so they are instant. The
other commands are a ``LightningCLI``, whose options are those of the classes that a config names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from rllava_pl import __version__
from rllava_pl.cli import configs
from rllava_pl.cli.errors import UsageError, debugging, nearest
from rllava_pl.redaction import redact

if TYPE_CHECKING:
    from rllava_pl.cli.app import RLCLI

TRAINER_COMMANDS = {
    "fit": "train a policy by reinforcement learning",
    "validate": "score a policy on the validation split",
    "test": "score a policy on the test split",
    "predict": "write a policy's answers to the test split",
}
OTHER_COMMANDS = {
    "check-data": "check every row of a config's data, without training",
    "plan": "show how much memory a config's run takes, without weights and without a GPU",
    "configs": "list the configs that --config finds by name",
}
COMMANDS = TRAINER_COMMANDS | OTHER_COMMANDS

USAGE = f"""\
usage: python -m rllava_pl COMMAND [options]

RL post-training of vision-language models, native to PyTorch Lightning.

commands:
{"".join(f"  {name:12}{what}{chr(10)}" for name, what in COMMANDS.items())}
examples:
  python -m rllava_pl fit --config quickstart
  python -m rllava_pl fit --config quickstart --config algorithms/gspo --model.group_size 16
  python -m rllava_pl check-data --config my_run.yaml
  python -m rllava_pl plan --config my_run.yaml --gpu 24GiB --ram 64GB
  python -m rllava_pl test --config runs/quickstart/version_0/config.yaml --ckpt_path PATH

help:
  python -m rllava_pl fit --help               every option of the trainer
  python -m rllava_pl fit --model.help GRPO    every option of a class; also --model.policy.help, --data.help, ...
  python -m rllava_pl fit --config quickstart --print_config
  python -m rllava_pl --version
"""


def main(args: list[str] | None = None) -> RLCLI | None:
    """Run one command.

    Args:
        args: The words after ``python -m rllava_pl``; those of this process by default.

    Returns:
        The finished command with its ``trainer``, ``model`` and ``datamodule``; None for a command without a Trainer.

    Raises:
        SystemExit: With code 2 after a mistake in the arguments, a config or the data, which is printed in one line on
            stderr; with ``RLLAVA_PL_DEBUG=1`` the error itself is raised. With code 1 if ``check-data`` or ``plan``
            find that the run would not start or not fit.
    """
    try:
        return _run(list(sys.argv[1:] if args is None else args))
    except UsageError as error:
        if debugging():
            raise
        print(redact(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def _run(words: list[str]) -> RLCLI | None:
    command = words[0] if words else "--help"
    if command in TRAINER_COMMANDS:
        args = configs.resolve(words)  # before the imports, so that a wrong name is answered at once
        from rllava_pl.cli.app import RLCLI
        from rllava_pl.cli.warnings import filter_warnings

        with filter_warnings():
            return RLCLI(args)
    if command in OTHER_COMMANDS:
        module = import_module(f"rllava_pl.cli.{command.replace('-', '_')}")
        if code := module.run(words[1:]):
            raise SystemExit(code)
    elif command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"rllava-pl {__version__}")
    else:
        hint = nearest(command, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError(f"{command!r} is not a command{hint}")
    return None
