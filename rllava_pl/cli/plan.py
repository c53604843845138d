"""``python -m rllava_pl plan``: how much memory a run will take in each phase, without weights and without a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from rllava_pl.callbacks import RolloutCallback
from rllava_pl.callbacks.plan_settings import placement_with, settings_of
from rllava_pl.cli import configs
from rllava_pl.cli.app import RLCLI
from rllava_pl.cli.errors import UsageError, with_hint
from rllava_pl.cli.names import import_class
from rllava_pl.cli.quiet import quiet
from rllava_pl.memory import (
    Advice,
    Limits,
    Phase,
    Plan,
    Prompts,
    Settings,
    advise,
    largest_cache,
    largest_micro_batch,
    parse_bytes,
    placement_of,
    plan,
)
from rllava_pl.memory.units import gib
from rllava_pl.modules import RLModule

if TYPE_CHECKING:
    from rllava_pl.memory.sizes import MakeOptimizer

ABOUT = """\
Say how many bytes each phase of a run takes on the GPU and on the host, which micro-batch and which cache of keys and
values would fit, and what to change if the run does not. Nothing is downloaded, loaded or trained: the model is built
without memory and one micro-step of it is traced. All other options are those of `fit`, e.g. --model.group_size 16.
"""
EXIT_CODES = "exit code: 0 every phase fits, 1 one does not, 2 usage"


class PlanCLI(RLCLI):
    """The module and the rollout callback of a config of ``fit``; no data, no logger, no strategy, no Trainer."""

    callbacks: Sequence[Callback] = ()

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(["fit", *args])

    def build(self) -> None:
        """Only what has a say in memory."""
        config = self.config[self.subcommand]
        model = config.model.clone()
        if _option(model.init_args, "optimizer", "class_path", default="").startswith("deepspeed."):
            del model.init_args["optimizer"]  # it would be compiled; the plan knows what it keeps
        given = config.trainer.callbacks
        chosen = [x for x in (given if isinstance(given, list) else [given]) if _is_rollout(x)]
        parts = Namespace(model=model, trainer=Namespace(callbacks=chosen))
        built = self._parser(self.subcommand).instantiate(parts)
        self.model, self.callbacks = built.model, built.trainer.callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        """There is nothing to run."""


def run(words: Sequence[str]) -> int:
    """Plan and print.

    Args:
        words: Options behind ``plan``.

    Returns:
        0 if every phase fits, else 1.

    Raises:
        UsageError: The options or the config cannot be read, or nothing is known of the model or the strategy.
    """
    options, rest = _parser().parse_known_args(list(words))
    with quiet():
        cli = PlanCLI(configs.resolve(rest))
        try:
            limits, settings = _limits(options), _settings(cli, options)
            found = plan(settings, cli.model.optimizer)
        except (ValueError, OSError) as error:
            raise UsageError(with_hint(str(error))) from error
        report = _report(found, limits, cli.model.optimizer)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(found, limits, report)
    return 0 if report["fits"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rllava_pl plan",
        description=ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", metavar="SIZE", help="memory of one GPU, e.g. 24GiB; left out: the run is on the CPU")
    parser.add_argument("--ram", metavar="SIZE", required=True, help="memory of one machine, e.g. 64GB")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the run, all in this machine unless --machines")
    parser.add_argument("--machines", type=int, default=1, help="machines the ranks are spread over")
    parser.add_argument("--prompt_tokens", type=int, help="longest prompt, images included; else data's, or 1024")
    parser.add_argument("--images", type=int, default=1, help="images of a prompt")
    parser.add_argument("--image_tokens", type=int, default=256, help="tokens one image becomes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


# -- from config to settings -----------------------------------------------------------------------------------------


def _limits(options: argparse.Namespace) -> Limits:
    """Of one rank: a GPU of its own, and its part of the machine's memory."""
    if options.ranks < 1 or options.machines < 1 or options.ranks % options.machines:
        raise ValueError(f"--ranks {options.ranks} cannot be spread evenly over --machines {options.machines}")
    gpu = parse_bytes(options.gpu) if options.gpu else 0
    return Limits(gpu, parse_bytes(options.ram) * options.machines // options.ranks)


def _settings(cli: PlanCLI, options: argparse.Namespace) -> Settings:
    config, module = cli.config[cli.subcommand], cast(RLModule, cli.model)
    module.source.prepare(module.seed)
    data = config.data.init_args if config.data else Namespace()
    tokens = options.prompt_tokens or _option(data, "max_prompt_tokens", default=0) or Prompts.tokens
    strategy = config.trainer.strategy
    name, arguments = (strategy, {}) if isinstance(strategy, str) else (strategy.class_path, vars(strategy.init_args))
    placement = placement_of(
        "auto" if name == "auto" and options.ranks == 1 else "rl_ddp" if name == "auto" else name, arguments
    )
    placement = placement_with(placement, module.optimizer([torch.nn.Parameter(torch.zeros(1))]))
    return settings_of(
        module,
        cli.callbacks,
        placement=placement,
        precision=str(config.trainer.precision or "32-true"),
        ranks=options.ranks,
        batch_prompts=_option(data, "batch_size", default=32),
        prompts=Prompts(tokens, options.images, options.image_tokens),
        device="cuda" if options.gpu else "cpu",
    )


def _option(section: Any, *path: Any, default: Any = None) -> Any:  # noqa: ANN401 - a parsed config has no types
    for key in path:
        section = section.get(key) if section is not None else None
    return default if section is None else section


def _is_rollout(item: Namespace) -> bool:
    return issubclass(import_class(item.class_path), RolloutCallback)


# -- what is printed -------------------------------------------------------------------------------------------------


def _report(found: Plan, limits: Limits, optimizer: MakeOptimizer) -> dict[str, Any]:
    """Everything that was found, as JSON holds it."""
    fits, cache = found.fits(limits), largest_cache(found, limits)
    return {
        "fits": fits,
        "model": found.settings.source.path,
        "parameters": found.shapes.parameters,
        "trained_parameters": found.shapes.trained,
        "placement": found.settings.placement.name,
        "ranks": found.settings.ranks,
        "limits": {"gpu_bytes": limits.gpu, "host_bytes": limits.host},
        "phases": {phase.name: _phase(phase) for phase in found.phases},
        "largest": {"gpu_bytes": found.gpu, "host_bytes": found.host},
        "micro_batch_size": found.settings.micro_rows,
        "largest_micro_batch_size": largest_micro_batch(found, limits, optimizer),
        "largest_kv_cache": {"bytes": cache, "tokens": cache // found.shapes.kv_bytes},
        "advice": [vars(item) for item in advise(found, limits, optimizer)] if not fits else [],
    }


def _phase(phase: Phase) -> dict[str, object]:
    return {"gpu_bytes": phase.gpu, "host_bytes": phase.host, "lines": [vars(line) for line in phase.lines]}


def _print(found: Plan, limits: Limits, report: Mapping[str, Any]) -> None:
    console = Console()
    console.print(_heading(found), highlight=False, markup=False, soft_wrap=True)
    console.print(_phases(found, limits))
    console.print(_breakdown(found))
    cache = report["largest_kv_cache"]
    lines = [
        f"micro-batch: {report['micro_batch_size']} rows; the largest that fits: {report['largest_micro_batch_size']}",
        f"room for keys and values: {gib(cache['bytes']):.1f} GiB, {cache['tokens']} tokens",
        _verdict(found, limits),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report["advice"]:
        console.print(_advice([Advice(**item) for item in report["advice"]]))


def _heading(found: Plan) -> str:
    settings, shapes = found.settings, found.shapes
    prompt = settings.prompts
    images = f", of these {prompt.images} x {prompt.image_tokens} of images" if prompt.images else ""
    return (
        f"{settings.source.path}: {shapes.parameters:,} parameters, {shapes.trained:,} trained, "
        f"{settings.loaded.dtype}; {settings.placement.name}, {settings.ranks} rank(s)\n"
        f"a micro-batch of {settings.micro_rows} rows: {prompt.tokens} prompt tokens{images}, "
        f"{settings.max_tokens} response tokens"
    )


def _phases(found: Plan, limits: Limits) -> Table:
    """GiB of every phase; what is assumed, not computed, stands apart."""
    table = Table(title="GiB on one rank", title_justify="left")
    for name in ("phase", "GPU computed", "GPU assumed", "GPU", "host computed", "host assumed", "host"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in found.phases:
        cells = [phase.name]
        for kind, total, limit in (("gpu", phase.gpu, limits.gpu), ("host", phase.host, limits.host)):
            assumed = sum(getattr(line, kind) for line in phase.lines if line.assumed)
            cells += [f"{gib(total - assumed):.2f}", f"{gib(assumed):.2f}"]
            cells.append(f"[bold red]{gib(total):.2f}[/]" if total > limit else f"{gib(total):.2f}")
        table.add_row(*cells)
    return table


def _breakdown(found: Plan) -> Table:
    """The lines of the phases that need most."""
    phases = {max(found.phases, key=lambda p: p.gpu).name, max(found.phases, key=lambda p: p.host).name}
    table = Table("phase", "what", title="the largest phases, line by line, GiB", title_justify="left")
    table.add_column("GPU", justify="right")
    table.add_column("host", justify="right")
    for phase in (phase for phase in found.phases if phase.name in phases):
        for line in phase.lines:
            what = f"{line.what} (assumed)" if line.assumed else line.what
            cells = [f"{gib(size):.2f}" if size else "" for size in (line.gpu, line.host)]
            table.add_row(phase.name, what, *cells)
    return table


def _verdict(found: Plan, limits: Limits) -> str:
    need = " and ".join(
        f"{gib(used):.1f} of {gib(limit):.1f} GiB on the {where}"
        for used, limit, where in ((found.gpu, limits.gpu, "GPU"), (found.host, limits.host, "host"))
    )
    if found.settings.device == "cpu":
        need = f"{gib(found.host):.2f} of {gib(limits.host):.2f} GiB, beside Python and its libraries"
    return f"{'fits' if found.fits(limits) else 'DOES NOT FIT'}: {need}"


def _advice(items: Sequence[Advice]) -> Table:
    table = Table("one change", title="what helps; GiB the largest phase has less", title_justify="left")
    for name in ("GPU", "host", "then it fits"):
        table.add_column(name, justify="right")
    for item in items:
        table.add_row(item.option, f"{gib(item.gpu):.2f}", f"{gib(item.host):.2f}", "yes" if item.fits else "no")
    return table
