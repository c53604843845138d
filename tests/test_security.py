"""The promises of SECURITY.md: no source file runs or loads foreign code, and neither does any file that is read."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rllava_pl.checkpoint.io import AtomicCheckpointIO
from rllava_pl.cli import main
from rllava_pl.loop import guard
from rllava_pl.models import VLM
from rllava_pl.modules import GRPO
from tests import runs

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "rllava_pl").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

CALLS = {"eval", "exec", "compile", "__import__"}
"""As bare names: ``module.eval()`` is another thing."""
MODULES = {"builtins", "cloudpickle", "code", "codeop", "dill", "joblib", "marshal", "pickle", "runpy", "shelve"}
MEMBERS = {
    *("os.system", "os.popen", "os.spawnl", "os.spawnv", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(
        "torch.package",
        "torch.hub",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "pd.read_pickle",
        "ctypes.pythonapi",
    ),
}
FORBIDDEN = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True, "shell": True}
"""Options and the value that is not allowed."""


def findings(source: str) -> list[str]:
    """What ``source`` does that could run or load foreign code, with its line."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in sorted(_unsafe(node))]


def _unsafe(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        modules = names if isinstance(node, ast.Import) else [node.module or "", *(f"{node.module}.{n}" for n in names)]
        yield from {module.partition(".")[0] for module in modules} & MODULES if not getattr(node, "level", 0) else ()
        yield from set(modules) & MEMBERS
    if isinstance(node, ast.Attribute) and ast.unparse(node) in MEMBERS:
        yield ast.unparse(node)
    if isinstance(node, ast.Call):
        yield from _unsafe_call(node)
    if isinstance(node, ast.Dict):  # options that are passed as a mapping
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and _is_forbidden(key.value, value):
                yield f"{key.value}={ast.unparse(value)}"


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if isinstance(node.func, ast.Name) and name in CALLS:
        yield name
    yield from (f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if _is_forbidden(k.arg, k.value))
    if name == "torch.load" and not any(k.arg == "weights_only" for k in node.keywords):
        yield "torch.load without weights_only"
    if name == "getattr" and any(isinstance(x, ast.Constant) and x.value in CALLS for x in node.args):
        yield ast.unparse(node)


def _is_forbidden(option: object, value: ast.expr) -> bool:
    return isinstance(option, str) and ast.unparse(value) == str(FORBIDDEN.get(option, "no such option"))


def test_source_runs_and_loads_no_foreign_code() -> None:
    found = {str(file.relative_to(ROOT)): findings(file.read_text("utf-8")) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("eval(text)", "line 1: eval"),
        ("x = 1\nexec(text)", "line 2: exec"),
        ("from pickle import load", "line 1: pickle"),
        ("def f():\n    import dill as d", "line 2: dill"),
        ("import builtins", "line 1: builtins"),
        ("from os import system", "line 1: os.system"),
        ("getattr(x, 'eval')", "line 1: getattr(x, 'eval')"),
        ("torch.load(path, weights_only=False)", "line 1: weights_only=False"),
        ("torch.load(path)", "line 1: torch.load without weights_only"),
        ("load(path, trust_remote_code=True)", "line 1: trust_remote_code=True"),
        ("load(**{'trust_remote_code': True})", "line 1: trust_remote_code=True"),
        ("np.load(path, allow_pickle=True)", "line 1: allow_pickle=True"),
        ("subprocess.run(line, shell=True)", "line 1: shell=True"),
        ("os.system(line)", "line 1: os.system"),
        ("yaml.load(text, Loader)", "line 1: yaml.load"),
    ],
)
def test_unsafe_source_is_found(source: str, finding: str) -> None:
    assert findings(source) == [finding]


@pytest.mark.parametrize(
    "source",
    [
        "module.eval()",
        "torch.compile(module)",
        "re.compile(x)",
        "torch.load(path, weights_only=True)",
        "evaluate()",
        "yaml.safe_load(text)",
        "f(trust_remote_code=False)",
        "from .pickle import x",
    ],
)
def test_safe_source_is_accepted(source: str) -> None:
    assert findings(source) == []


# -------------------------------------------------------------------------------------------------------- hostile files


class Payload:
    """A pickle that makes a directory when it is loaded, in place of something worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint with a payload, which must not have run when the test is over."""
    path, mark = tmp_path / "hostile.ckpt", tmp_path / "it-worked"
    plain = {"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.6", "global_step": 0}
    torch.save(plain | {"loops": Payload(mark)}, path)
    yield path
    assert not mark.exists()


def test_payload_runs_when_unpickled(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "mark"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").is_dir()


REFUSED = r"(?i)weights.?only|unsupported global|GLOBAL posix.mkdir"


def test_hostile_checkpoint_is_refused_at_resume(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=REFUSED):
        runs.trainer(tmp_path).fit(runs.module(), runs.data(), ckpt_path=hostile, weights_only=True)


def test_hostile_checkpoint_is_refused_at_resume_without_weights_only(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=REFUSED):
        runs.trainer(tmp_path).fit(runs.module(), runs.data(), ckpt_path=hostile)


def test_hostile_checkpoint_is_refused_by_the_command_line(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.policy.warmup_steps=40", f"--model.policy.cache_dir={runs.CACHE}", "--trainer.logger=false"]
    with pytest.raises((Exception, SystemExit), match=REFUSED):
        main(["test", "--config=tiny/colour", f"--ckpt_path={hostile}", *options])


def test_hostile_checkpoint_is_refused_by_load_from_checkpoint(hostile: Path) -> None:
    with pytest.raises(Exception, match=REFUSED):
        GRPO.load_from_checkpoint(hostile, policy=runs.tiny(), rewards=[])


def test_hostile_checkpoint_is_refused_by_the_checkpoint_io(hostile: Path) -> None:
    with pytest.raises(Exception, match=REFUSED):
        AtomicCheckpointIO().load_checkpoint(hostile)


def test_hostile_batch_dump_is_refused(hostile: Path) -> None:
    with pytest.raises(Exception, match=REFUSED):
        guard.load_batch(hostile)


def test_hostile_weights_of_a_model_are_refused(hostile: Path, tmp_path: Path) -> None:
    source = runs.tiny()
    source.prepare(0)
    model = Path(shutil.copytree(source.path, tmp_path / "model"))
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    shutil.copy(hostile, model / "pytorch_model.bin")
    with pytest.raises(Exception, match=REFUSED):
        VLM(str(model)).load(temperature=1.0)


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    source = runs.tiny()
    source.prepare(0)
    model = Path(shutil.copytree(source.path, tmp_path / "model"))
    (model / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it-worked')!r})\n", "utf-8")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(Exception, match=r"(?i)trust_remote_code|theirs"):
        VLM(str(model)).load(temperature=1.0)
    assert not (tmp_path / "it-worked").exists()
