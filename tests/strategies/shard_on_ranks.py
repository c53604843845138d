"""Run by the tests on each of several ranks: one strategy through several short fits, findings by rank to a directory.

``python shard_on_ranks.py DIRECTORY STRATEGY PROMPTS_A_RANK``
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy

from rllava_pl import modules
from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.models.trainable import LoRA
from rllava_pl.strategies import RLDDPStrategy, RLDeepSpeedStrategy, RLFSDP2Strategy, RLFSDPStrategy
from rllava_pl.strategies.updates import full_weights
from tests import runs


def zero(stage: int, **options: object) -> RLDeepSpeedStrategy:
    """With a threshold of 0, or a tiny model would not be cut at all."""
    return RLDeepSpeedStrategy(stage=stage, param_persistence_threshold=0, allow_cpu=True, **options)


STRATEGIES: dict[str, Callable[[], Strategy | str]] = {
    "one": lambda: "auto",
    "rl_ddp": RLDDPStrategy,
    "rl_fsdp": lambda: RLFSDPStrategy(allow_cpu=True),
    "rl_fsdp2": lambda: RLFSDP2Strategy(allow_cpu=True),
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "zero3_offload": lambda: zero(3, offload_optimizer=True, offload_parameters=True),
}


class Notes(Callback):
    """What a run was like: loss and norm of every update, and the weights it began and ended with."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.began: dict[str, torch.Tensor] = {}
        self.ended: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, module):
        self.began = weights(trainer, module)
        step = module.step

        def noted(minibatch, losses):
            total = sum(loss.result.double() for loss in losses)
            if dist.is_initialized():
                dist.all_reduce(total)
            self.losses.append(float(total))
            return step(minibatch, losses)

        module.step = noted
        add = module.tally.add
        module.tally.add = lambda name, x, *count: (
            self.norms.append(float(x)) if name == "grad_norm" else None,
            add(name, x, *count),
        )

    def on_train_end(self, trainer, module):
        self.ended = weights(trainer, module)


def weights(trainer, module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in sorted(full_weights(trainer.strategy, module.policy.model))}


def digest(named: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, x in named.items():
        total.update(name.encode() + x.contiguous().numpy().tobytes())
    return total.hexdigest()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)  # Adam blows rounding up


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class Runs:
    """Fits under one strategy."""

    def __init__(self, root: Path, strategy: str, batch_size: int) -> None:
        self.root, self.strategy, self.batch_size = root, strategy, batch_size

    def fit(self, name: str, algorithm: str, ckpt_path: str | None = None, callbacks=(), policy=None, **options):
        kind = getattr(modules, algorithm)
        module = runs.module(kind, policy=policy, max_grad_norm=0.5, **options)
        notes = Notes()
        trainer = runs.trainer(
            self.root,
            strategy=STRATEGIES[self.strategy](),
            devices=int(os.environ.get("WORLD_SIZE", "1")),
            callbacks=[notes, *callbacks],
        )
        data = runs.data(batch_size=self.batch_size, demonstrations=runs.share_of_targets(kind))
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return {
            "losses": notes.losses,
            "norms": notes.norms,
            "digest": digest(notes.began),
            "ended": notes.ended,
            "ended_digest": digest(notes.ended),
            "metrics": {
                k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("time/")
            },
        }


def main(root: Path, strategy: str, batch_size: int, only: str) -> None:
    torch.set_num_threads(1)
    here = Runs(root, strategy, batch_size)
    found = {}
    options = {"optimizer": adam, "max_rollouts": 6, "minibatches": 1, "epochs": 2, "lr_schedule": "linear"}
    wanted = only.split(",")
    if "adam" in wanted:
        keep = RolloutCheckpoint(str(root / "checkpoints"), every_n_rollouts=3, keep=0)
        found["adam"] = here.fit("adam", "SFT", callbacks=[keep], micro_batch_size=1, **options)
        path = str(root / "checkpoints" / "rollout-000003.ckpt")
        found["resumed"] = here.fit("resumed", "SFT", ckpt_path=path, micro_batch_size=1, **options)
    if "kl" in wanted:
        found["kl"] = here.fit(
            "kl", "GRPO", optimizer=sgd, kl_loss_coef=0.1, max_rollouts=2, minibatches=1, micro_batch_size=4
        )
    if "critic" in wanted:
        found["critic"] = here.fit("critic", "PPO", optimizer=sgd, max_rollouts=2, minibatches=1, critic_lr_factor=0.1)
    if "lora" in wanted:
        policy = runs.tiny(lora=LoRA(r=4, alpha=8), gradient_checkpointing=True)
        found["lora"] = here.fit(
            "lora", "GRPO", policy=policy, optimizer=sgd, kl_loss_coef=0.1, max_rollouts=2, minibatches=1,
            micro_batch_size=4,
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(found, root / f"found-{rank}.pt")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "adam,kl,critic,lora")
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
