"""Runs with HostAdamW equal runs with torch's AdamW, and resume bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import AdamW

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.loop.options import Batching, Schedule
from rllava_pl.modules import RLModule
from rllava_pl.optim import HostAdamW
from tests import runs

OPTIONS = {
    "batching": Batching(num_minibatches=2, micro_batch_size=4),
    "max_grad_norm": 0.5,
    "schedule": Schedule("cosine", warmup_steps=2),
}
"""Accumulation, clipping and a scheduler."""


class Log(Callback):
    """Loss and gradient norm of every rollout."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, *_: object) -> None:
        metrics = trainer.callback_metrics
        self.seen.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))


@pytest.mark.slow
def test_fifty_updates_of_a_vlm_equal_adamw(tmp_path: Path) -> None:
    """Two updates of two micro-batches a rollout; vision tower, connector and tied embedding are trained."""
    ends, logs = [], []
    for make in (partial(AdamW, fused=True), HostAdamW):
        module = runs.module(optimizer=partial(make, lr=1e-3, weight_decay=0.01), max_rollouts=25, **OPTIONS)
        logs.append(log := Log())
        runs.trainer(tmp_path, callbacks=[log]).fit(module, runs.data(batch_size=4))
        ends.append(module)
    assert ends[0].state.updates == 50
    assert logs[0].seen == logs[1].seen and max(norm for _, norm in logs[0].seen) > 0.5
    for (name, p), q in zip(ends[0].named_parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(p, q), name
        assert q.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("states", ["float32", "int8"])
def test_a_run_in_bf16_resumes_bit_by_bit(tmp_path: Path, states: str) -> None:
    """With fp32 masters in the checkpoint, and without any."""

    def fit(checkpoint: Path | None = None) -> RLModule:
        policy = runs.tiny()
        policy.dtype = "bfloat16"
        optimizer = partial(HostAdamW, lr=1e-3, states=states, gradients="bfloat16")
        module = runs.module(policy=policy, optimizer=optimizer, **OPTIONS)
        keep = RolloutCheckpoint(str(tmp_path / "all"), every_n_rollouts=1, keep=0)
        callbacks = [] if checkpoint else [keep]
        runs.trainer(tmp_path, callbacks=callbacks).fit(module, runs.data(batch_size=4), ckpt_path=checkpoint)
        return module

    whole = fit()
    resumed = fit(tmp_path / "all" / "rollout-000002.ckpt")
    assert resumed.state.rollouts == 4
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q), name
    first, second = (module.optimizers().optimizer.state_dict()["state"] for module in (whole, resumed))
    assert first.keys() == second.keys()
    for index, tensors in first.items():
        assert ("master" in tensors) == (states == "float32")
        assert all(torch.equal(x, second[index][name]) for name, x in tensors.items())


def test_ranks_that_exchange_gradients_are_refused(tmp_path: Path) -> None:
    module = runs.module(optimizer=partial(HostAdamW, lr=1e-3))
    trainer = runs.trainer(tmp_path, strategy="rl_ddp", devices=1)
    with pytest.raises(ValueError, match="HostAdamW moves gradients away before RLDDPStrategy can exchange them"):
        trainer.fit(module, runs.data(batch_size=4))
    torch.distributed.destroy_process_group()  # Lightning leaves it, and forks of later tests would inherit it
