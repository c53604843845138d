"""Short real runs for tests: a tiny model, drawn pictures, Lightning's own Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from rllava_pl import modules
from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.loop.options import Batching
from rllava_pl.models import TinyVLM
from rllava_pl.modules import GRPO, PolicyModule, RLModule
from rllava_pl.rewards import AnswerTagReward, Scoring
from rllava_pl.types import Sampling

ALGORITHMS = [x for name in modules.__all__ if (x := getattr(modules, name)) not in (PolicyModule, RLModule)]
"""Every algorithm of the package, found where users find it."""

CACHE = Path(tempfile.gettempdir()) / "rllava_pl-tests"
"""Models are functions of their recipe, so that a cache over test runs is safe and saves seconds."""
COLORS = ["red", "green", "blue", "yellow", "purple", "white"]


def tiny(family: str = "idefics3", *, warmup_steps: int = 40, **options: object) -> TinyVLM:
    """A tiny model of the colour task that knows the answer format and nothing of colours."""
    return TinyVLM(
        family,
        questions=["What color is the shape?"],
        answers=COLORS,
        warmup_steps=warmup_steps,
        cache_dir=str(CACHE),
        **options,
    )


def module(algorithm: type[PolicyModule] = GRPO, policy: TinyVLM | None = None, **options: object) -> PolicyModule:
    """A module for short runs: 4 completions a prompt, 2 updates a rollout, AdamW 1e-3; one update where it says so."""
    defaults: dict[str, object] = {
        "rewards": [AnswerTagReward()],
        "sampling": Sampling(max_tokens=6),
        "scoring": Scoring(isolation="none", max_unscored=1.0),  # processes of rewards have tests of their own
        "max_rollouts": 4,
        "batching": Batching(num_minibatches=2),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        "seed": 1,
    }
    if issubclass(algorithm, RLModule):
        defaults["group_size"] = 4
    try:
        return algorithm(policy or tiny(), **(defaults | options))
    except ValueError as error:
        if "batching" in options or "a rollout serves one update" not in str(error):
            raise
        return algorithm(policy or tiny(), **(defaults | options | {"batching": Batching()}))


def share_of_targets(algorithm: type[PolicyModule]) -> float:
    """Prompts with a target that suit the algorithm: all where it learns from nothing else, some elsewhere."""
    return 0.5 if algorithm.needs_rewards else 1.0


def accepts(algorithm: type[PolicyModule], **options: object) -> bool:
    """Whether a module of ``module`` takes these options together."""
    try:
        module(algorithm, **options)
    except (TypeError, ValueError):
        return False
    return True


def data(batch_size: int = 4, train_size: int = 24, **options: object) -> SyntheticVisionDataModule:
    """The colour task, small."""
    sizes = {"train_size": train_size, "val_size": 8, "test_size": 8}
    return SyntheticVisionDataModule(task="color", batch_size=batch_size, seed=1, **(sizes | options))


def trainer(root: Path, **options: object) -> Trainer:
    """A quiet CPU Trainer."""
    quiet: dict[str, object] = {
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    return Trainer(**(quiet | options))
