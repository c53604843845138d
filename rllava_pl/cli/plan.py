"""``python -m rllava_pl plan``: the memory that a run takes in each phase, without weights and without a GPU."""

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
from rllava_pl.cli.app import PartialCLI
from rllava_pl.cli.errors import UsageError, command_parser, with_hint
from rllava_pl.cli.messages import import_class
from rllava_pl.cli.warnings import filter_warnings
from rllava_pl.memory import (
    MemoryLimits,
    MemoryPlan,
    PlanSettings,
    PromptSize,
    advise,
    largest_kv_cache,
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
Show how many bytes each phase of a run takes on the GPU and on the host, the largest micro-batch and KV cache that
fit, and what to change if the run does not. Nothing is downloaded or trained: the model is built without memory and one
micro-step of it is traced. All other options are those of `fit`, e.g. --model.group_size 16.
"""
EXIT_CODES = "exit code: 0 every phase fits, 1 one does not, 2 usage"


class PlanCLI(PartialCLI):
    """Builds the module and the rollout callback of a config of ``fit``."""

    callbacks: Sequence[Callback] = ()

    def build(self) -> None:
        """The parts that take memory."""
        config = self.config[self.subcommand]
        model = config.model.clone()
        optimizer = model.init_args.get("optimizer")
        if optimizer is not None and str(optimizer.get("class_path")).startswith("deepspeed."):
            del model.init_args["optimizer"]  # DeepSpeed would compile it; its size is known without
        callbacks = config.trainer.callbacks
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        rollout = [item for item in callbacks if issubclass(import_class(item.class_path), RolloutCallback)]
        built = self._parser(self.subcommand).instantiate(Namespace(model=model, trainer=Namespace(callbacks=rollout)))
        self.model, self.callbacks = built.model, built.trainer.callbacks


def run(args: Sequence[str]) -> int:
    """Plan and print; 0 if every phase fits, else 1."""
    parser = command_parser("plan", ABOUT, EXIT_CODES)
    parser.add_argument("--gpu", metavar="SIZE", help="memory of one GPU, e.g. 24GiB; without it the run is on the CPU")
    parser.add_argument("--ram", metavar="SIZE", required=True, help="memory of one machine, e.g. 64GB")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the run")
    parser.add_argument("--machines", type=int, default=1, help="machines that share the ranks")
    parser.add_argument("--prompt_tokens", type=int, help="longest prompt, images included; default: data's, or 1024")
    parser.add_argument("--images", type=int, default=1, help="images of a prompt")
    parser.add_argument("--image_tokens", type=int, default=256, help="tokens of one image")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options, rest = parser.parse_known_args(args)
    with filter_warnings():
        cli = PlanCLI(configs.resolve(rest))
        try:
            limits, settings = limits_of(options), settings_of_config(cli, options)
            found = plan(settings, cli.model.optimizer)
        except (ValueError, OSError) as error:
            raise UsageError(with_hint(str(error))) from error
        report = _report(found, limits, cli.model.optimizer)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(found, limits, report)
    return 0 if report["fits"] else 1


def limits_of(options: argparse.Namespace) -> MemoryLimits:
    """The limits of one rank: one GPU, and its share of a machine's memory."""
    if options.ranks < 1 or options.machines < 1 or options.ranks % options.machines:
        raise ValueError(f"--ranks {options.ranks} cannot be spread evenly over --machines {options.machines}")
    host = parse_bytes(options.ram) * options.machines // options.ranks
    return MemoryLimits(parse_bytes(options.gpu) if options.gpu else 0, host)


def settings_of_config(cli: PlanCLI, options: argparse.Namespace) -> PlanSettings:
    """The inputs of the plan, from a config and the options of the command."""
    config, module = cli.config[cli.subcommand], cast(RLModule, cli.model)
    module.policy.prepare(module.seed)
    data = config.data.init_args if config.data else Namespace()
    tokens = options.prompt_tokens or data.get("max_prompt_tokens") or PromptSize.tokens
    strategy = config.trainer.strategy
    name, arguments = (strategy, {}) if isinstance(strategy, str) else (strategy.class_path, vars(strategy.init_args))
    if name == "auto" and options.ranks > 1:
        name = "rl_ddp"
    optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    return settings_of(
        module,
        cli.callbacks,
        placement=placement_with(placement_of(name, arguments), optimizer),
        precision=str(config.trainer.precision or "32-true"),
        ranks=options.ranks,
        batch_prompts=data.get("batch_size") or 32,
        prompt=PromptSize(tokens, options.images, options.image_tokens),
        device="cuda" if options.gpu else "cpu",
    )


def _report(found: MemoryPlan, limits: MemoryLimits, optimizer: MakeOptimizer) -> dict[str, Any]:
    """The plan as JSON."""
    fits, cache = found.fits(limits), largest_kv_cache(found, limits)
    return {
        "fits": fits,
        "model": found.settings.model.path,
        "parameters": found.size.parameters,
        "trained_parameters": found.size.trained,
        "placement": found.settings.placement.name,
        "ranks": found.settings.ranks,
        "limits": {"gpu_bytes": limits.gpu, "host_bytes": limits.host},
        "phases": {
            phase.name: {"gpu_bytes": phase.gpu, "host_bytes": phase.host, "items": [vars(x) for x in phase.items]}
            for phase in found.phases
        },
        "largest": {"gpu_bytes": found.gpu, "host_bytes": found.host},
        "micro_batch_size": found.settings.micro_batch_rows,
        "largest_micro_batch_size": largest_micro_batch(found, limits, optimizer),
        "largest_kv_cache": {"bytes": cache, "tokens": cache // found.size.kv_bytes},
        "advice": [vars(item) for item in advise(found, limits, optimizer)] if not fits else [],
    }


def _print(found: MemoryPlan, limits: MemoryLimits, report: Mapping[str, Any]) -> None:
    console, settings, size, prompt = Console(), found.settings, found.size, found.settings.prompt
    images = f", of these {prompt.images} x {prompt.image_tokens} of images" if prompt.images else ""
    print(
        f"{settings.model.path}: {size.parameters:,} parameters, {size.trained:,} trained, "
        f"{settings.loaded_model.dtype}; {settings.placement.name}, {settings.ranks} rank(s)\n"
        f"a micro-batch of {settings.micro_batch_rows} rows: {prompt.tokens} prompt tokens{images}, "
        f"{settings.max_tokens} response tokens"
    )
    console.print(_phases(found, limits))
    console.print(_items(found))
    cache = report["largest_kv_cache"]
    print(f"micro-batch: {settings.micro_batch_rows} rows; largest that fits: {report['largest_micro_batch_size']}")
    print(f"largest KV cache that fits: {gib(cache['bytes']):.1f} GiB, {cache['tokens']} tokens")
    if settings.device == "cpu":
        need = f"{gib(found.host):.2f} of {gib(limits.host):.2f} GiB, beside Python and its libraries"
    else:
        need = f"{gib(found.gpu):.1f} of {gib(limits.gpu):.1f} GiB on the GPU and "
        need += f"{gib(found.host):.1f} of {gib(limits.host):.1f} GiB on the host"
    print(f"{'fits' if report['fits'] else 'DOES NOT FIT'}: {need}")
    if report["advice"]:
        table = _table("what helps, GiB saved in the largest phase", ["one change"], ["GPU", "host", "then it fits"])
        for item in report["advice"]:
            saved = [f"{gib(item[kind]):.2f}" for kind in ("gpu", "host")]
            table.add_row(item["option"], *saved, "yes" if item["fits"] else "no")
        console.print(table)


def _phases(found: MemoryPlan, limits: MemoryLimits) -> Table:
    """GiB of every phase, with what is assumed separate from what is computed."""
    kinds = [f"{where}{how}" for where in ("GPU", "host") for how in (" computed", " assumed", "")]
    table = _table("GiB on one rank", ["phase"], kinds)
    for phase in found.phases:
        cells = [phase.name]
        for kind, total, limit in (("gpu", phase.gpu, limits.gpu), ("host", phase.host, limits.host)):
            assumed = sum(getattr(item, kind) for item in phase.items if item.assumed)
            cells += [f"{gib(total - assumed):.2f}", f"{gib(assumed):.2f}"]
            cells.append(f"[bold red]{gib(total):.2f}[/]" if total > limit else f"{gib(total):.2f}")
        table.add_row(*cells)
    return table


def _items(found: MemoryPlan) -> Table:
    """The items of the phase that needs most on the GPU, and of the one that needs most on the host."""
    names = {max(found.phases, key=lambda p: p.gpu).name, max(found.phases, key=lambda p: p.host).name}
    table = _table("items of the largest phases, GiB", ["phase", "what"], ["GPU", "host"])
    for phase in (phase for phase in found.phases if phase.name in names):
        for item in phase.items:
            sizes = [f"{gib(size):.2f}" if size else "" for size in (item.gpu, item.host)]
            table.add_row(phase.name, f"{item.what} (assumed)" if item.assumed else item.what, *sizes)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(*texts, title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right")
    return table
