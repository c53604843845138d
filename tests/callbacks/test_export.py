"""An export loads like any other model and equals the trained policy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rllava_pl.callbacks import ExportHF
from rllava_pl.callbacks.export import NOTE, export
from rllava_pl.models import VLM, LoRA
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import hf_weights
from rllava_pl.modules import PolicyModule
from rllava_pl.types import PolicyBatch
from tests import runs
from tests.callbacks.conftest import Run


def trained(root: Path, family: str = "idefics3", lora: LoRA | None = None, **options: object) -> PolicyModule:
    """Two rollouts of a tiny model, exported after each to ``root/hf``."""
    module = runs.module(policy=runs.tiny(family, warmup_steps=10, lora=lora), max_rollouts=2, **options)
    runs.trainer(root, callbacks=[ExportHF(every_n_rollouts=1)]).fit(module, runs.data())
    return module


@torch.no_grad()
def logp(policy: Policy) -> Tensor:
    """Log-probs of fixed tokens behind two prompts with images."""
    data = runs.data()
    data.setup("fit")
    ids = torch.randint(20, 60, (4, 5), generator=torch.Generator().manual_seed(0))
    inputs = tuple(policy.encode([data.val_prompts[k] for k in range(2)]))
    return policy(PolicyBatch(inputs, 2, ids, torch.ones_like(ids, dtype=torch.bool))).logp_NT


def weight_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_the_reloaded_policy_equals_the_trained_one(tmp_path: Path, family: str) -> None:
    module = trained(tmp_path, family)
    reloaded = VLM(str(tmp_path / "hf")).load()
    assert torch.equal(logp(reloaded), logp(module.policy))
    assert not torch.equal(logp(reloaded), logp(VLM(module.policy.path).load()))  # the training changed it


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_adapters_are_merged(tmp_path: Path, family: str) -> None:
    module = trained(tmp_path, family, LoRA(r=2))
    reloaded = VLM(str(tmp_path / "hf")).load()
    assert torch.allclose(logp(reloaded), logp(module.policy), atol=1e-5)
    assert (logp(reloaded) - logp(VLM(module.policy.path).load())).abs().max() > 1e-3
    assert not list((tmp_path / "hf").glob("adapter*"))


def test_tied_weights_with_an_adapter_on_one_name_are_untied(tmp_path: Path) -> None:
    module = trained(tmp_path, lora=LoRA(r=2, target_modules=["lm_head"]))
    reloaded = VLM(str(tmp_path / "hf")).load()
    assert "lm_head.weight" in weight_names(tmp_path / "hf")
    assert torch.allclose(logp(reloaded), logp(module.policy), atol=1e-5)


def test_exported_files_equal_those_of_the_original_model(run: Run) -> None:
    source, target = Path(run.module.policy.path), run.folder / "hf"
    assert weight_names(target) == weight_names(source)  # tied weights once, under the names of the checkpoint
    names = {path.name for path in source.iterdir()} - {"tiny_vlm.json"}
    assert {path.name for path in target.iterdir()} == names | {NOTE}
    for name in ("generation_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (target / name).read_text("utf-8") == (source / name).read_text("utf-8"), name
    assert json.loads((target / NOTE).read_text("utf-8")).items() >= {"rollouts": 4, "updates": 8}.items()


def test_gathered_copies_of_tied_weights_are_written_once(run: Run, tmp_path: Path) -> None:
    gathered = ((name, tensor.clone()) for name, tensor in hf_weights(run.module.policy.model))
    export(run.module.policy, gathered, tmp_path / "hf")
    assert weight_names(tmp_path / "hf") == weight_names(Path(run.module.policy.path))


def test_a_new_export_replaces_the_older_one_as_a_whole(run: Run, tmp_path: Path) -> None:
    policy, directory = run.module.policy, tmp_path / "hf"
    export(policy, hf_weights(policy.model), directory, {"rollouts": 1})
    (directory / "model-00002-of-00002.safetensors").write_text("of an older, larger export")
    export(policy, hf_weights(policy.model), directory, {"rollouts": 2})
    assert not (directory / "model-00002-of-00002.safetensors").exists()
    assert json.loads((directory / NOTE).read_text("utf-8"))["rollouts"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failed_export_keeps_the_older_one(run: Run, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(hf_weights(policy.model)))
        raise OSError("a rank was lost")

    policy, directory = run.module.policy, tmp_path / "hf"
    export(policy, hf_weights(policy.model), directory)
    with pytest.raises(OSError, match="a rank was lost"):
        export(policy, broken(), directory)
    assert torch.equal(logp(VLM(str(directory)).load()), logp(policy))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_directory_with_other_content_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    module = runs.module(max_rollouts=1)
    message = f"ExportHF: {tmp_path} exists and is not an earlier export (it has no {NOTE}), so it is not replaced"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        runs.trainer(tmp_path, callbacks=[ExportHF(str(tmp_path))]).fit(module, runs.data())
    assert module.state.rollouts == 0
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_is_filled(run: Run, tmp_path: Path) -> None:
    export(run.module.policy, hf_weights(run.module.policy.model), tmp_path)
    assert (tmp_path / NOTE).is_file()


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_rollouts is -1; it must be positive, or 0 for the end only"):
        ExportHF(every_n_rollouts=-1)
