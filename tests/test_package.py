"""The package as a whole: instant import, imports between packages, docstrings, the wheel."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rllava_pl

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "rllava_pl"
FILES = sorted(PACKAGE.rglob("*.py"))

# Optional, or heavy: an import of these belongs inside the function that needs it.
LAZY = frozenset(
    {
        "bitsandbytes",
        "datasets",
        "deepspeed",
        "httpx",
        "liger_kernel",
        "math_verify",
        "peft",
        "ray",
        "sklearn",
        "tenacity",
        "torchvision",
        "transformers",
        "trl",
        "vllm",
    }
)
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"


def run(*command: str, cwd: Path = REPOSITORY, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished process, output and errors as text."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def imported(node: ast.AST) -> set[str]:
    """Top-level names of the packages one import statement loads."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").partition(".")[0]}
    return set()


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node that runs when the file is imported: not function bodies, not ``if TYPE_CHECKING:``."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def eager_imports(source: str) -> set[str]:
    """Packages of ``LAZY`` that ``source`` loads when it is imported."""
    return {name for node in at_import_time(ast.parse(source).body) for name in imported(node)} & LAZY


def undocumented(source: str) -> list[str]:
    """The file itself and its public functions and classes, methods included, that have no docstring."""

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name[0] == "_":
                continue
            if not ast.get_docstring(child) and not is_overload_or_override(child):
                yield f"line {child.lineno}: {prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")

    tree = ast.parse(source)
    return ([] if ast.get_docstring(tree) else ["the file"]) + list(walk(tree, ""))


def is_overload_or_override(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether another definition has the documentation; setters share that of their property."""
    return any(ast.unparse(d).rpartition(".")[2] in {"overload", "override", "setter"} for d in node.decorator_list)


def violations(check) -> dict[str, list[str]]:
    """Findings of ``check`` by file, for files that have any."""
    findings = {str(file.relative_to(REPOSITORY)): sorted(check(file.read_text("utf-8"))) for file in FILES}
    return {file: found for file, found in findings.items() if found}


def test_import_of_the_package_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import rllava_pl; print(*sorted(set(sys.modules) - before))"
    process = run(sys.executable, "-c", code)
    foreign = [name for name in process.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names]
    assert foreign == ["rllava_pl"], process.stderr


def test_version_equals_changelog_and_citation():
    assert f"## [{rllava_pl.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert f"\nversion: {rllava_pl.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text("utf-8")


def test_heavy_and_optional_packages_are_imported_inside_functions():
    assert violations(eager_imports) == {}


def test_public_names_have_docstrings():
    assert violations(undocumented) == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import vllm", {"vllm"}),
        ("from transformers.cache_utils import Cache", {"transformers"}),
        ("try:\n    import ray\nexcept ImportError:\n    ray = None", {"ray"}),
        ("class A:\n    import peft", {"peft"}),
        ("def f():\n    import vllm", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel", set()),
        ("from .vllm import Engine", set()),
    ],
)
def test_eager_import_is_found(source, found):
    assert eager_imports(source) == found


def test_missing_docstring_is_found():
    source = '"""File."""\ndef f(): ...\ndef _g(): ...\nclass A:\n    """A."""\n    def m(self): ...\n'
    assert undocumented(source) == ["line 2: f", "line 6: A.m"]


def test_packages_import_in_one_direction():
    process = run(sys.executable, "-c", LINT_IMPORTS)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("functional", "import rllava_pl.rewards"),
        ("rewards", "import rllava_pl.modules"),
        ("modules", "import rllava_pl.callbacks"),
        ("datamodules", "import rllava_pl.cli"),
        ("functional", "import transformers"),
        ("functional", "def f():\n    import lightning"),
    ],
)
def test_forbidden_import_breaks_the_contract(tmp_path, package, line):
    shutil.copytree(PACKAGE, tmp_path / "rllava_pl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "rllava_pl" / package / "trespasser.py").write_text(f"{line}\n", "utf-8")
    process = run(sys.executable, "-c", LINT_IMPORTS, cwd=tmp_path, path=tmp_path)
    assert process.returncode == 1, process.stdout + process.stderr
    assert f"rllava_pl.{package}.trespasser ->" in process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of this tree, built as `pip install .` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    process = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    assert process.returncode == 0, process.stdout + process.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_has_the_package_its_types_and_every_config(wheel):
    configs = {f"rllava_pl/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("configs/**/*.yaml")}
    sources = {str(path.relative_to(REPOSITORY)) for path in FILES}
    assert "rllava_pl/configs/quickstart.yaml" in configs
    assert configs | sources | {"rllava_pl/py.typed"} <= set(wheel.namelist())


def test_wheel_has_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"rllava_pl", f"rllava_pl-{rllava_pl.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def requirements() -> list[str]:
    """Requirements of the core and of all extras, as written in pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    return [line for part in (project["dependencies"], *project["optional-dependencies"].values()) for line in part]


def test_every_dependency_has_a_lower_and_an_upper_bound():
    loose = [r for r in requirements() if not ("==" in r or (">=" in r and "<" in r.partition(">=")[2]))]
    assert loose == []


def test_no_extra_requires_torchvision():
    assert [r for r in requirements() if r.startswith("torchvision")] == []
