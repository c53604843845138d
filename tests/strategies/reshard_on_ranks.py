"""Run by the tests on each of several ranks: fits that save a checkpoint and fits that resume one.

``python reshard_on_ranks.py DIRECTORY ACTION...``: the action ``STRATEGY:save`` saves ``STRATEGY-RANKS``, and
``STRATEGY:NAME`` resumes the checkpoint of this name. Results go to ``DIRECTORY/ACTION-on-RANKS.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.modeling_layers import GradientCheckpointingLayer

from rllava_pl.strategies import RLFSDP2Strategy, RLFSDPStrategy
from rllava_pl.strategies.sharding import state_tensors

STRATEGIES = {"rl_fsdp": RLFSDPStrategy, "rl_fsdp2": RLFSDP2Strategy}
STEPS = 3
"""Before and after the checkpoint."""


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """Sizes that two ranks cannot divide evenly, and a bias of which the second rank has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Module(LightningModule):
    """All ranks see the same rows, so that their number does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.register_buffer("level", torch.zeros(()))

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.policy = Net()
        self.reference = Net().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.policy(x) - self.reference(x).detach()

    def training_step(self, step: int, batch_idx: int) -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(self.trainer.global_step))
        optimizer = self.optimizers()
        self.manual_backward((self.trainer.strategy.model(x) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        self.level += 1

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(2 * STEPS), batch_size=None)

    def configure_optimizers(self):
        groups = [{"params": self.policy.layers.parameters()}, {"params": self.policy.head.parameters(), "lr": 0.05}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)]


class Notes(Callback):
    """Saves after half of the steps and records the full state there, where a run resumes, and at the end."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.found: dict[str, dict[str, object]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["start"] = state(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == STEPS and not self.checkpoint.exists():
            self.found["saved"] = state(trainer)
            trainer.save_checkpoint(self.checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["end"] = state(trainer)


def state(trainer: Trainer) -> dict[str, object]:
    """Weights, moments and settings of the optimizer, in full."""
    strategy = trainer.strategy
    named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in trainer.lightning_module.named_parameters()}
    strategy.reshard()
    shards = {name: strategy.shards()[id(p)] for name, p in named.items()}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    tensors, plain = state_tensors(strategy.optimizers[0], trained, shards)
    steps = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    moments = sorted(set().union(*gathered([name for name in tensors if name not in steps])))
    for name in moments:  # the first generation keeps no state where a rank has no element
        shard = shards[name.rsplit("/", 1)[0]]
        tensors.setdefault(name, shard.with_local(torch.zeros_like(shard.local)))
    full = {name: shard.full_tensor(torch.device("cpu")) for name, shard in shards.items()}
    full |= {name: tensors[name].full_tensor(torch.device("cpu")) for name in moments}
    full |= {"level": trainer.lightning_module.level.clone()}
    return {"tensors": full, "steps": {float(x) for x in steps.values()}, "groups": plain["param_groups"]}


def gathered(own: list[str]) -> list[list[str]]:
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def fit(directory: Path, action: str) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    strategy, source = action.split(":")
    checkpoint = directory / f"{f'{strategy}-{ranks}' if source == 'save' else source}.ckpt"
    notes = Notes(checkpoint)
    trainer = Trainer(
        accelerator="cpu",
        strategy=STRATEGIES[strategy](allow_cpu=True),
        devices=ranks,
        callbacks=[notes],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), ckpt_path=None if source == "save" else checkpoint, weights_only=True)
    if trainer.is_global_zero:
        torch.save(notes.found, directory / f"{action}-on-{ranks}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for action in sys.argv[2:]:
        fit(Path(sys.argv[1]), action)
    dist.barrier()  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
    dist.destroy_process_group()
