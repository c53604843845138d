"""The trained policy as a directory that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import rllava_pl
from rllava_pl.callbacks.files import run_directory
from rllava_pl.checkpoint.atomic import replace_directory, temporary_beside
from rllava_pl.models.policy import Policy
from rllava_pl.models.quiet import no_progress_bar
from rllava_pl.modules import PolicyModule
from rllava_pl.strategies.adapter import adapter_for

log = logging.getLogger(__name__)

NOTE = "rllava_pl_export.json"
"""File that says what was exported, and marks a directory that a later export may replace."""


class ExportHF(Callback):
    """Writes the policy in Hugging Face format: weights, config, generation config, tokenizer and image processor.

    LoRA adapters are merged and tied weights written once, under the names of the original checkpoint, so that
    transformers and inference servers load the directory like any other model. A new export replaces the previous one
    as a whole; a directory with other content is never changed.

    Args:
        dirpath: Directory of the export; by default ``hf`` in the run's folder.
        every_n_rollouts: Rollouts between two exports; 0 exports at the end of the run only.
    """

    def __init__(self, dirpath: str = "", every_n_rollouts: int = 0) -> None:
        if every_n_rollouts < 0:
            raise ValueError(f"every_n_rollouts is {every_n_rollouts}; it must be positive, or 0 for the end only")
        self.dirpath = dirpath
        self.every_n_rollouts = every_n_rollouts
        self.directory: Path | None = None
        """Directory of the present run's export; set in ``setup``."""
        self._exported = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a directory with other content before the training."""
        if stage == "fit":
            self.directory = Path(self.dirpath).expanduser() if self.dirpath else run_directory(trainer) / "hf"
            check_replaceable(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset what was exported."""
        self._exported = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Export every n rollouts."""
        module = cast(PolicyModule, pl_module)
        if self.every_n_rollouts and module.state.rollouts % self.every_n_rollouts == 0:
            self._export(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the end of the run."""
        self._export(trainer, cast(PolicyModule, pl_module))

    def _export(self, trainer: Trainer, module: PolicyModule) -> None:
        state = module.state
        if self.directory is None or self._exported == state.rollouts:
            return
        weights = adapter_for(trainer.strategy).full_weights(module.policy.model)
        if trainer.is_global_zero:
            note = {"rollouts": state.rollouts, "updates": state.updates, "policy": module.policy.path}
            export(module.policy, weights, self.directory, note)
        else:
            for _ in weights:  # every rank takes part in gathering sharded weights
                pass
        self._exported = state.rollouts


def export(
    policy: Policy, weights: Iterable[tuple[str, Tensor]], directory: Path, note: Mapping[str, object] | None = None
) -> None:
    """Write a policy as a model directory, atomically.

    Args:
        policy: Architecture, configs and processor; its weights are not read.
        weights: ``(name, full tensor)`` of the whole model without adapters, as ``full_weights`` streams them.
        directory: Absent, empty, or an earlier export, which is replaced.
        note: Written to the directory as ``rllava_pl_export.json``.

    Raises:
        FileExistsError: The directory has other content.
    """
    check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(directory)
    try:
        with no_progress_bar():
            _save_model(policy, dict(weights), temporary)
        if (tokenizer := getattr(policy.tokenizer, "backend_tokenizer", None)) is not None:
            tokenizer.no_padding()  # transformers sets both in every call, and would save them
            tokenizer.no_truncation()
        policy.processor.save_pretrained(temporary)
        record = {"rllava_pl": rllava_pl.__version__, **(note or {})}
        (temporary / NOTE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("exported the policy to %s", directory)


def check_replaceable(directory: Path) -> None:
    """Refuse a directory that is neither absent, nor empty, nor an earlier export.

    Raises:
        FileExistsError: Replacing it would delete other files.
    """
    if directory.is_dir() and (not any(directory.iterdir()) or (directory / NOTE).is_file()):
        return
    if directory.exists():
        raise FileExistsError(
            f"ExportHF: {directory} exists and is not an earlier export (it has no {NOTE}), so it is not replaced; "
            "choose another dirpath or remove it"
        )


def _save_model(policy: Policy, weights: dict[str, Tensor], directory: Path) -> None:
    """Save weights and configs through a copy without weights, since the model may be sharded or have adapters.

    ``save_pretrained`` of a model with adapters would write the adapters alone.
    """
    model = policy.model
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    config = copy.deepcopy(model.config)
    for name, source in model.all_tied_weights_keys.items():
        if name in weights and source in weights:
            if torch.equal(weights[name], weights[source]):
                del weights[name]
            else:  # an adapter on one of the two made them differ
                config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        copied = type(model)._from_config(config, dtype=model.dtype)
    copied.generation_config = model.generation_config
    copied.save_pretrained(directory, state_dict=weights)
