"""``python -m rllava_pl check-data``: checks every row of a config's data as ``fit`` does, without training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from rllava_pl.cli import configs
from rllava_pl.cli.app import PartialCLI
from rllava_pl.cli.errors import UsageError, command_parser, raised_by_us, with_hint
from rllava_pl.cli.warnings import filter_warnings
from rllava_pl.datamodules import BaseDataModule, PromptDataModule
from rllava_pl.datamodules.audit import Audit, audit, audit_prompts
from rllava_pl.datamodules.rejections import CODES, Rejection, write_report

SPLITS = ("train", "val", "test")
EXAMPLES = 3
"""Rows shown of each code."""
ABOUT = """\
Check every row of the data that a config of `fit` names, images included, and list the rows that cannot be used, with
the reason. No model is loaded, only its processor, which measures prompts, where the config names its path.
All other options are those of `fit`, e.g. --data.max_prompt_tokens 1024.
"""
EXIT_CODES = "exit code: 0 the run would start, 1 more rows are refused than data.max_reject_fraction allows, 2 usage"


class DataCLI(PartialCLI):
    """Builds the data module of a config of ``fit``."""

    def build(self) -> None:
        """The data module alone."""
        parsed = self.config[self.subcommand]
        self.datamodule = self._parser(self.subcommand).instantiate(Namespace(data=parsed.data)).data


@dataclass(frozen=True)
class Checked:
    """The result of one split."""

    split: str
    audit: Audit
    allowed: float
    """Fraction of rows that may be rejected."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether a run would start."""
        return len(self.audit.rejections) <= self.allowed * self.audit.total

    def by_code(self) -> dict[str, list[Rejection]]:
        """Rejected rows by code, sorted by code."""
        codes = sorted({rejection.code for rejection in self.audit.rejections})
        return {code: [r for r in self.audit.rejections if r.code == code] for code in codes}


def run(args: Sequence[str]) -> int:
    """Check and print; 0 if all splits are good enough to train, else 1."""
    parser = command_parser("check-data", ABOUT, EXIT_CODES)
    parser.add_argument("--split", choices=SPLITS, help="check only this one; default: every split that has a source")
    parser.add_argument("--report", metavar="FILE", help="write every rejected row there, as JSON lines")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--decode", action="store_true", help="decode every image in full; slower, and more thorough")
    options, rest = parser.parse_known_args(args)
    with filter_warnings():
        data = DataCLI(configs.resolve(rest)).datamodule
        try:
            if not isinstance(data, BaseDataModule):
                raise ValueError(f"check-data needs a subclass of BaseDataModule; {type(data).__name__} is none")
            named = [split for split in SPLITS if not isinstance(data, PromptDataModule) or data.specs[split]]
            splits = [options.split] if options.split else named or ["train"]
            results = [_check(data, split, options.decode) for split in splits]
        except (ValueError, OSError, ImportError) as error:
            if raised_by_us(error):
                raise UsageError(with_hint(str(error))) from error
            raise
    if options.report:
        write_report(Path(options.report), [r for result in results for r in result.audit.rejections])
    if options.json:
        print(json.dumps({result.split: _as_json(result) for result in results}, indent=2))
    else:
        _print(results, options.report)
    return 0 if all(result.passed for result in results) else 1


def _check(data: BaseDataModule, split: str, decode: bool) -> Checked:
    start, console = time.perf_counter(), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(split, total=None)
        tick = partial(progress.advance, task)
        if isinstance(data, PromptDataModule):
            sources, allowed = data.sources(split), data.max_reject_fraction
            progress.update(task, total=sum(len(source.table.rows) for source in sources))
            verdicts = audit(sources, decode, tick)
        else:  # the prompts are generated, not read
            data.setup("test" if split == "test" else "fit")
            prompts, allowed = getattr(data, f"{split}_prompts"), 0.0
            progress.update(task, total=len(prompts))
            verdicts = audit_prompts(prompts, f"{type(data).__name__}.{split}_prompts", tick)
    if not verdicts.total:
        raise ValueError(f"the {split} split has no rows")
    return Checked(split, verdicts, allowed, time.perf_counter() - start)


def _as_json(result: Checked) -> dict[str, object]:
    refused = {
        code: {"meaning": CODES[code], "rows": len(rows), "examples": [asdict(row) for row in rows[:EXAMPLES]]}
        for code, rows in result.by_code().items()
    }
    return {
        "passed": result.passed,
        "rows": result.audit.total,
        "accepted": len(result.audit.kept),
        "rejected": len(result.audit.rejections),
        "max_reject_fraction": result.allowed,
        "rejected_by_code": refused,
        "repaired_by_code": dict(sorted(result.audit.repairs.items())),
        "seconds": round(result.seconds, 3),
    }


def _print(results: Sequence[Checked], report: str | None) -> None:
    """One line for each split, and a table with number and examples of the rows of every code."""
    for result in results:
        verdicts = result.audit
        rows = f"{verdicts.total} rows, {len(verdicts.kept)} usable, {len(verdicts.rejections)} refused"
        limit = "" if result.passed else f", more than the allowed {result.allowed:.2%}"
        print(f"{result.split}: {rows}{limit} ({result.seconds:.1f} s)")
        table = Table("code", "meaning", "rows", "examples")
        for code, refused in result.by_code().items():
            examples = [
                f"{row.source} row {row.row}{f' (line {row.line})' if row.line else ''}, {row.field}: {row.message}"
                for row in refused[:EXAMPLES]
            ]
            table.add_row(code, CODES[code], str(len(refused)), Text("\n".join(examples)))
        for code, count in sorted(verdicts.repairs.items()):
            table.add_row(code, CODES[code], str(count), "repaired and used")
        if table.row_count:
            Console().print(table)
    if report:
        print(f"every refused row: {report}")
