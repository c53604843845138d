"""A short real run with everything that a checkpoint must hold, and a clock to say when something happens to it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Callback

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.strategies.checkpoint_io import AtomicCheckpointIO
from rllava_pl.types import Sampling
from tests import runs

ROLLOUTS = 5
BETWEEN = "between"
"""Outside all phases: data, callbacks, pruning."""
WRITE = "write"
"""From the first byte of a checkpoint to its name; a part of the phase ``save``."""


class Clock:
    """Counts the calls made by Python, which are the same in every run, and acts at one of them.

    Args:
        at: Number of the call; 0: never.
        act: What happens then.
    """

    def __init__(self, at: int = 0, act: Callable[[Clock], None] | None = None) -> None:
        self.at, self.act = at, act
        self.calls = 0
        self.phases = [BETWEEN]
        self.spans: list[tuple[str, int]] = []
        """Each phase that began, inner ones again when they go on, with the number of the call."""

    def __call__(self, frame: object, event: str, argument: object) -> None:
        self.calls += 1
        if self.calls == self.at and self.act is not None:
            self.act(self)

    @property
    def phase(self) -> str:
        return self.phases[-1]

    def phase_begins(self, name: str) -> None:
        self.phases.append(name)
        self.spans.append((self.phase, self.calls))

    def phase_ends(self, name: str, seconds: float = 0.0) -> None:
        self.phases.pop()
        self.spans.append((self.phase, self.calls))

    @contextmanager
    def running(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


class Watched(Callback):
    """Puts the clock into the run, and keeps a record of what was committed."""

    def __init__(self, clock: Clock, saved: RolloutCheckpoint, record: Path) -> None:
        self.clock, self.saved, self.record = clock, saved, record

    def setup(self, trainer: object, pl_module: RLModule, stage: str) -> None:
        pl_module.observers.append(self.clock)

    def on_train_batch_end(self, trainer: object, pl_module: RLModule, *_: object) -> None:
        if self.saved.last_path and pl_module.trainer.is_global_zero:
            with self.record.open("a") as file:
                file.write(f"{Path(self.saved.last_path).stem[-6:]}\n")


def train(root: Path, clock: Clock, every_n_rollouts: int = 1) -> None:
    """Train to the end from the newest checkpoint; leaves ``final-<rank>.pt``."""
    torch.set_num_threads(1)
    saved = RolloutCheckpoint(str(root / "checkpoints"), every_n_rollouts=every_n_rollouts, keep=2)
    module = runs.module(
        GRPO,
        max_rollouts=ROLLOUTS,
        max_refills=1,
        kl_reward_coef=0.01,
        kl_target=0.001,
        kl_horizon=100,
        lr_schedule="cosine",
        sampling=Sampling(max_tokens=4),
    )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = runs.trainer(
        root,
        callbacks=[saved, Watched(clock, saved, root / "committed")],
        strategy="rl_ddp" if ranks > 1 else "auto",
        devices=ranks,
        limit_val_batches=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    with clock.running():
        data = runs.data(batch_size=2, train_size=18, val_size=4 * ranks, val_batch_size=2)
        trainer.fit(module, data, ckpt_path=saved.newest(trainer))
    torch.save(state(module), root / f"final-{trainer.global_rank}.pt")


def state(module: RLModule) -> dict[str, object]:
    """All that must not depend on what happened on the way."""
    optimizer = module.optimizers().optimizer
    metrics = {k: float(x) for k, x in module.trainer.callback_metrics.items() if not k.startswith("time/")}
    return {
        "weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": module.lr_schedulers().state_dict(),
        "kl_factor": module.kl_controller.coef,
        "rounds": module.collection.rounds,
        "metrics": metrics,
        "step": module.trainer.global_step,
    }


def same(a: object, b: object) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@contextmanager
def marking_writes(clock: Clock) -> Iterator[None]:
    """Tell the clock when a checkpoint is being written."""
    plain = AtomicCheckpointIO.save_checkpoint

    def marked(self: AtomicCheckpointIO, *args: object, **options: object) -> None:
        clock.phase_begins(WRITE)
        try:
            plain(self, *args, **options)
        finally:
            clock.phase_ends(WRITE)

    AtomicCheckpointIO.save_checkpoint = marked
    try:
        yield
    finally:
        AtomicCheckpointIO.save_checkpoint = plain


def moments(spans: list[tuple[str, int]], calls: int) -> dict[str, list[range]]:
    """Of each phase, the stretches of calls that belong to it."""
    found: dict[str, list[range]] = {}
    ends = [start for _, start in spans[1:]] + [calls]
    for (phase, start), end in zip(spans, ends, strict=True):
        if end > start + 1:
            found.setdefault(phase, []).append(range(start + 1, end))
    return found


def kill(clock: Clock) -> None:
    """SIGKILL; who looks at the directory finds where it happened."""
    os.kill(os.getpid(), signal.SIGKILL)
