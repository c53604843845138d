"""Run by the tests on each of several ranks: five short fits under one strategy; each rank writes what it found.

``python shard_on_ranks.py DIRECTORY STRATEGY PROMPTS_A_RANK``
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from rllava_pl import modules
from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.distributed.collectives import rank, sum_over_ranks
from rllava_pl.loop import guard
from rllava_pl.loop.options import KL, Batching, Schedule
from rllava_pl.models.trainable import LoRA
from rllava_pl.models.vlm import TinyVLM
from rllava_pl.strategies import RLDeepSpeedStrategy, RLFSDP2Strategy, RLFSDPStrategy, adapter_for
from rllava_pl.types import Message, Prompt, TrainingBatch
from tests import runs


def zero(stage: int, **offload: bool) -> RLDeepSpeedStrategy:
    """ZeRO that shards even a tiny model."""
    return RLDeepSpeedStrategy(stage, param_persistence_threshold=0, allow_cpu=True, **offload)


STRATEGIES: dict[str, Callable[[], Strategy | str]] = {
    "auto": lambda: "auto",
    "rl_ddp": lambda: "rl_ddp",
    "rl_fsdp": lambda: RLFSDPStrategy(allow_cpu=True),
    "rl_fsdp2": lambda: RLFSDP2Strategy(allow_cpu=True),
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "zero3_offload": lambda: zero(3, offload_optimizer=True, offload_parameters=True),
}
SHORT = {"max_rollouts": 2, "batching": Batching(), "max_grad_norm": 0.5}


def sgd(lr: float) -> dict[str, object]:
    """Adam amplifies rounding where gradients are small."""
    return {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr)}


class HalfTextOnly(Callback):
    """Every other prompt loses its image: some micro-batches are text only, on one rank and not on the other."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        for name in ("train_prompts", "test_prompts"):
            setattr(
                data, name, [text_only(prompt) if k % 2 else prompt for k, prompt in enumerate(getattr(data, name))]
            )


def text_only(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, messages=(Message("user", ("What color is the shape?",)),), images=())


class Notes(Callback):
    """Loss and norm of every update, the weights before and after.

    Args:
        skipped: Number of the update that is skipped, as if it were not finite.
    """

    def __init__(self, skipped: int = -1) -> None:
        self.skipped = skipped
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = digest(weights(trainer, pl_module))
        self.most_alive = most_alive(adapter_for(trainer.strategy).full_weights(pl_module.policy.model))
        self.held = sum(local(p).numel() for p in pl_module.parameters())
        self.all_finite = guard.all_finite
        guard.all_finite = self.record

    def record(self, minibatch: TrainingBatch, losses: torch.Tensor, norm: torch.Tensor) -> bool:
        """In place of the check for finite numbers, which gets everything behind an update."""
        self.minibatch = minibatch
        self.losses.append(float(sum_over_ranks(losses[:, 0].double().sum())))
        self.norms.append(float(norm))
        return self.all_finite(minibatch, losses, norm) and len(self.losses) - 1 != self.skipped

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """A forward without a backward leaves weights gathered; what is saved then must be sharded all the same."""
        pl_module.updater.forward(trainer.strategy.model, self.minibatch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        guard.all_finite = self.all_finite
        self.ended = weights(trainer, pl_module)


def local(p: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter between forwards."""
    return getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p)


def weights(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in adapter_for(trainer.strategy).full_weights(module.policy.model)}


def digest(named: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, x in sorted(named.items()):
        total.update(name.encode() + x.contiguous().numpy().tobytes())
    return total.hexdigest()


def most_alive(stream: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Tensors of a stream that its generator keeps alive when the reader keeps none."""
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, x in stream:
        most = max(most, sum(one() is not None for one in seen))
        seen.append(weakref.ref(x))
        del x
    return most


def fit(
    root: Path,
    strategy: str,
    batch_size: int,
    algorithm: str,
    *,
    policy: TinyVLM | None = None,
    callbacks: tuple[Callback, ...] = (),
    skipped: int = -1,
    resume: Path | None = None,
    **options: object,
) -> dict[str, object]:
    """What one fit did."""
    kind, notes = getattr(modules, algorithm), Notes(skipped)
    module = runs.module(kind, policy=policy, **(SHORT | options))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = runs.trainer(root, strategy=STRATEGIES[strategy](), devices=ranks, callbacks=[notes, *callbacks])
    share = runs.share_of_targets(kind)
    data = runs.data(batch_size=batch_size, demonstrations=share, test_size=5, val_batch_size=4 // ranks)
    trainer.fit(module, data, ckpt_path=resume, weights_only=resume and True)
    found = {"losses": notes.losses, "norms": notes.norms, "began": notes.began, "ended": notes.ended}
    found |= {"most_alive": notes.most_alive, "held": notes.held}
    if algorithm == "GRPO":  # five rows: one rank runs out of prompts
        found["test"] = trainer.test(module, data, verbose=False)[0]["test/reward"]
    return found


def main(root: Path, strategy: str, batch_size: int) -> None:
    torch.set_num_threads(1)

    def run(algorithm: str, **options: object) -> dict[str, object]:
        return fit(root, strategy, batch_size, algorithm, **options)

    keep = RolloutCheckpoint(str(root), every_n_rollouts=3, keep=0)
    adam = {
        "max_rollouts": 6,
        "batching": Batching(update_epochs=2, micro_batch_size=1),
        "schedule": Schedule("linear"),
    }
    shared = strategy != "auto"  # one process repeats prompts: the comparison covers everything that ranks do
    lora = runs.tiny(lora=LoRA(r=4, alpha=8), gradient_checkpointing=True, share_prompt=shared)
    half_text = {"policy": runs.tiny(share_prompt=shared), "callbacks": (HalfTextOnly(),), "skipped": 0}
    reference = {"kl": KL(loss_coef=0.1), "batching": Batching(micro_batch_size=4)}
    found = {
        "adam": run("SFT", callbacks=(keep,), **adam),
        "resumed": run("SFT", resume=root / "rollout-000003.ckpt", **adam),
        "reference": run("GRPO", **reference, **half_text, **sgd(0.5)),
        "adapters": run("GRPO", **reference, policy=lora, **sgd(2.0)),
        "critic": run("PPO", critic="separate", critic_lr_factor=0.1, **sgd(0.5)),
    }
    torch.save(found, root / f"found-{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
