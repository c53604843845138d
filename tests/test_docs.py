"""Docs and code agree: code of the pages runs, configs parse, links, names and defaults exist."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from rllava_pl import modules
from rllava_pl.cli import main
from rllava_pl.loop.options import KL, RENAMED, DynamicSampling, Evaluation, LengthPenalty, OptionGroup
from rllava_pl.modules import GRPO, PolicyModule, RLModule
from tests import runs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BASES = (PolicyModule, RLModule)
ALGORITHMS = {x.__name__: x for x in vars(modules).values() if inspect.isclass(x) and x not in BASES}
FILES = {name: f"{algorithm.__module__.rpartition('.')[2]}.md" for name, algorithm in ALGORITHMS.items()}
"""Pages have the names of the algorithms' files."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w[\w/.-]*\.(?:py|yaml|jsonl))\n")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"`((?:rllava_pl|configs|docs|tests|examples|benchmarks)/[\w./-]*|[A-Z]\w+(?:\.md|\.cff)|Makefile)`"
)
TESTS = re.compile(r'ARGS="(tests/[\w./]+)"')
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OPTION_ROW = re.compile(r"^\| `([\w.]+)` \| `([^`]+)` \|", re.MULTILINE)
OPTION = re.compile(r"`([a-z_]+\.[a-z_]+)`")
METRIC = re.compile(r"`((?:train|val|test|time)/[^`]+)`")
CLASS = re.compile(r"`([A-Z]\w*[a-z]\w*)(?:\([^`]*\))?`")
OLD_OPTION = re.compile(r"(?:--model\.|`)(\w+)(?=[`:= ])")
METRIC_ROW = re.compile(
    r"^\|(?P<only>[^`|]+\|| [^|`]*`[\w.]+` \|)? (?P<names>`(?:train|val|test|time)/[^|]+`) \|", re.MULTILINE
)
"""Names of metrics; in the second column where the first one is the condition under which they exist."""
LONG_RUN = re.compile(r"max_rollouts=\d+")
TRAINER_COMMAND = re.compile(r"-m rllava_pl ((?:fit|validate|test|predict) .*)")
FAULTS = {
    "train/skipped_updates",
    "train/skipped_nonfinite",
    "train/engine_faults",
    "time/save_seconds",
    "train/unscored_<cause>",
    "train/reward_flag_<flag>",
    "train/reward_restarts",
    "time/reward_<name>_p50_seconds",
    "time/reward_<name>_p99_seconds",
}
"""Metrics that a short run without faults and checkpoints, with rewards in the trainer, does not log."""
SECTIONS = {"seed_everything", "model", "data", "trainer"}
OTHER_CLASSES = {
    *dir(builtins),
    "AdamW",
    "Any",
    "AutoModelForImageTextToText",
    "CSVLogger",
    "DataLoader",
    "DeepSpeedCPUAdam",
    "DeepSpeedStrategy",
    "EarlyStopping",
    "FSDPStrategy",
    "GRPOTrainer",
    "LearningRateMonitor",
    "LightningModule",
    "ModelCheckpoint",
    "SLURMEnvironment",
    "Trainer",
}
"""Names of Python, Lightning, PyTorch, DeepSpeed and TRL."""


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    line: int
    """Of the page, at which the code begins."""
    code: str

    @property
    def file_name(self) -> str:
        """Name of the file, from its first line; empty if the block is no file."""
        named = FILE_NAME.match(self.code)
        return named[1] if named else ""


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text = page.read_text("utf-8")
    found = [Block(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def is_config(block: Block) -> bool:
    content = yaml.safe_load(block.code) if block.language == "yaml" else None
    return isinstance(content, dict) and bool(content) and content.keys() <= SECTIONS


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every call of the command line that needs no help text."""
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            match = TRAINER_COMMAND.search(line)
            if match and "help" not in line:
                yield shlex.split(match[1], comments=True)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a reader's: files named in the docs go there, and Python imports from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs.CACHE / "docs"))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(page: Path, folder: Path) -> None:
    """The files of a page."""
    for block in blocks(page, "python", "yaml"):
        if block.file_name:
            (folder / block.file_name).write_text(block.code, "utf-8")


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if blocks(page, "python")])
def test_python_of_a_page_runs(name: str, reader: Path) -> None:
    """Blocks of a page share a namespace; only the length of runs is cut, to two rollouts."""
    write_files(ROOT / name, reader)
    module = types.ModuleType("page")
    for block in blocks(ROOT / name, "python"):
        code = LONG_RUN.sub("max_rollouts=2", block.code)
        exec(compile("\n" * (block.line - 1) + code, str(ROOT / name), "exec"), vars(module))


@pytest.mark.parametrize(
    "name", [n for n, page in zip(NAMES, PAGES, strict=True) if any(map(is_config, blocks(page, "yaml")))]
)
def test_configs_of_a_page_parse(name: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config without model or data is read on top of tiny/colour, as the pages say."""
    write_files(ROOT / name, reader)
    for block in filter(is_config, blocks(ROOT / name, "yaml")):
        (reader / "block.yaml").write_text(block.code, "utf-8")
        base = [] if {"model", "data"} <= yaml.safe_load(block.code).keys() else ["--config", "tiny/colour"]
        assert_parses(["fit", *base, "--config", "block.yaml"], f"{name}:{block.line}", capsys)


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if any(commands(page))])
def test_commands_of_a_page_parse(name: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(ROOT / name, reader)
    for command in dict.fromkeys(map(tuple, commands(ROOT / name))):
        assert_parses([*command], f"{name}: {' '.join(command)}", capsys)


def assert_parses(command: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([part for part in command if part != "--print_config"] + ["--print_config"])
    assert done.value.code == 0, f"{where}: {capsys.readouterr().err}"


def test_excerpt_of_the_quickstart_config_equals_the_file() -> None:
    excerpt = yaml.safe_load(next(filter(is_config, blocks(DOCS / "quickstart.md", "yaml"))).code)["model"]["init_args"]
    whole = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))["model"]["init_args"]
    assert excerpt == {option: whole[option] for option in excerpt}


def option_groups() -> dict[str, set[str]]:
    """Names of the fields of every option group, by the option's name."""
    parameters = [p for x in ALGORITHMS.values() for p in inspect.signature(x).parameters.values()]
    groups = {p.name: p.default for p in parameters if dataclasses.is_dataclass(p.default)}
    return {name: {field.name for field in dataclasses.fields(group)} for name, group in groups.items()}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_named_options_of_groups_exist(page: Path) -> None:
    groups = option_groups()
    named = [name.split(".") for name in OPTION.findall(prose(page))]
    assert [f"{group}.{name}" for group, name in named if group in groups and name not in groups[group]] == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_renamed_options_are_not_named(page: Path) -> None:
    present = {name for x in ALGORITHMS.values() for name in inspect.signature(x).parameters}
    old = set(RENAMED) - present - {"micro_batch_size", "warmup_steps"}  # those are also fields of groups
    arguments = {"clip_low", "clip_high", "dual_clip"}  # of functions, which a recipe passes on
    if page.stem == "recipe":
        old -= arguments
    assert old.intersection(OLD_OPTION.findall(page.read_text("utf-8"))) == set()


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_named_metrics_are_explained(page: Path) -> None:
    """Components of rewards are ``<component>`` there, phases of the memory report ``<phase>``."""
    explained = {*METRIC.findall((DOCS / "metrics.md").read_text("utf-8"))}
    patterns = [re.compile(re.sub(r"<\w+>", r"\\w+", name) + r"|" + re.escape(name)) for name in explained]
    named = {name for name in METRIC.findall(prose(page)) if "..." not in name}
    assert [name for name in sorted(named) if not any(pattern.fullmatch(name) for pattern in patterns)] == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_named_classes_exist(page: Path) -> None:
    sources = [*(ROOT / "rllava_pl").rglob("*.py"), *PAGES]  # some are defined in blocks of a page
    ours = {name for path in sources for name in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE)}
    assert set(CLASS.findall(prose(page))) - ours - OTHER_CLASSES == set()


@pytest.mark.parametrize("name", NAMES)
def test_links_and_named_files_exist(name: str) -> None:
    page, text = ROOT / name, prose(ROOT / name)
    named = NAMED_FILE.findall(text) + TESTS.findall(text)
    missing = [f"`{path}`" for path in named if not (ROOT / path).exists()]
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in map(slug, HEADING.findall(prose(target)))):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    lines = [line for block in blocks(ROOT / name, "bash") for line in block.code.splitlines()]
    named = {match[1] for line in lines if (match := re.match(r"make (\w+)", line))}
    assert named <= targets


@pytest.mark.parametrize("name", NAMES)
def test_every_page_can_be_reached_from_the_readme(name: str) -> None:
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        queue += [page.parent / link.partition("#")[0] for link in LINK.findall(prose(page)) if "://" not in link]
    assert (ROOT / name).resolve() in seen


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_a_page_and_a_row_in_the_readme(algorithm: str) -> None:
    assert (DOCS / "algorithms" / FILES[algorithm]).is_file()
    assert f"(docs/algorithms/{FILES[algorithm]})" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_defaults_on_the_page_of_an_algorithm_are_those_of_its_class(algorithm: str) -> None:
    defaults: dict[str, object] = {}
    for parameter in inspect.signature(ALGORITHMS[algorithm]).parameters.values():
        default = parameter.default
        if isinstance(default, OptionGroup):
            defaults |= {f"{parameter.name}.{name}": x for name, x in dataclasses.asdict(default).items()}
        elif default is not parameter.empty:
            defaults[parameter.name] = default
    said = dict(OPTION_ROW.findall((DOCS / "algorithms" / FILES[algorithm]).read_text("utf-8")))
    assert said and said == {option: str(defaults.get(option, "no such option")) for option in said}


def metrics_said(*, only: bool) -> set[str]:
    """Names of metrics.md: those every algorithm with a reference logs, or those of some options and algorithms."""
    rows = METRIC_ROW.finditer((DOCS / "metrics.md").read_text("utf-8"))
    return {name for row in rows if bool(row["only"]) == only for name in row["names"][1:-1].split("`, `")}


def metrics_logged(
    root: Path, algorithm: type[PolicyModule] = GRPO, precision: str = "32-true", **options: object
) -> set[str]:
    """Names that a short run logs, components of the reward as ``<component>``."""
    often = {"limit_val_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = runs.trainer(root, precision=precision, **often)
    trainer.fit(runs.module(algorithm, max_rollouts=1, **options), runs.data(demonstrations=1.0))
    component, term = re.compile(r"(train/reward_|val/)(accuracy|format)"), re.compile(r"train/\w+_loss")
    return {term.sub("train/<term>_loss", component.sub(r"\1<component>", name)) for name in trainer.callback_metrics}


def test_every_logged_metric_is_explained(tmp_path: Path) -> None:
    logged = metrics_logged(tmp_path, evaluation=Evaluation(samples=2))
    assert {name for name in metrics_said(only=False) if not name.startswith("test/")} == logged


def test_metrics_of_options_and_algorithms_are_explained(tmp_path: Path) -> None:
    """All but those that such a run does not show."""
    options = {
        "dynamic_sampling": DynamicSampling(max_rounds=1),
        "length_penalty": LengthPenalty(buffer_tokens=3),
        "kl": KL(target=0.1),
        "entropy_coef": 0.01,
    }
    logged = metrics_logged(tmp_path, precision="bf16-mixed", **options)
    for algorithm in (modules.PPO, modules.SFT, modules.DPO, modules.LUFFY, modules.UFT, modules.HPT, modules.KLCov):
        logged |= metrics_logged(tmp_path, algorithm)
    said = metrics_said(only=True)
    assert logged - metrics_said(only=False) <= said
    assert said - logged == FAULTS
