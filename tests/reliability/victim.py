"""A short real run with everything that a checkpoint must hold, and a clock that acts at one moment of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.checkpoint.io import AtomicCheckpointIO
from rllava_pl.loop.options import KL, DynamicSampling, Schedule
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.strategies import RLFSDP2Strategy
from rllava_pl.strategies.sharding import ShardedStrategy
from rllava_pl.types import Sampling
from tests import runs

ROLLOUTS = 5
SHARDED = "VICTIM_SHARDED"
"""Environment variable: two processes shard the model (``rl_fsdp2``), and a checkpoint is a directory."""
BETWEEN = "between"
"""Outside all phases: data, callbacks, pruning."""
WRITE = "write"
"""From the first byte of a checkpoint to its rename; a part of the phase ``save``."""


class Clock:
    """Counts the calls of Python functions, which are the same in every run, and acts at one of them.

    Args:
        at: Number of the call; 0: never.
        act: Called then.
        counts: Whether to count, which makes a run slower.
    """

    def __init__(self, at: int = 0, act: Callable[[Clock], None] | None = None, counts: bool = True) -> None:
        self.at, self.act, self.counts = at, act, counts
        self.calls = 0
        self.phases = [BETWEEN]
        self.spans: list[tuple[str, int]] = []
        """Each phase that began or continued after an inner one, with the number of the call."""

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


class Record(Logger):
    """Appends to a file what is logged, and the newest checkpoint at that time."""

    name, version = "record", 0

    def __init__(self, path: Path, saved: RolloutCheckpoint) -> None:
        super().__init__()
        self.path, self.saved = path, saved

    def log_hyperparams(self, *_: object) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        exact = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        committed = int(Path(self.saved.last_path).stem[-6:]) if self.saved.last_path else -1
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "metrics": exact, "committed": committed}) + "\n")


class Clocked(Callback):
    """Makes the clock an observer of the phases."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def setup(self, trainer: Trainer, pl_module: RLModule, stage: str) -> None:
        pl_module.phases.observers.append(self.clock)


def train(root: Path, clock: Clock, every_n_rollouts: int = 1) -> None:
    """Train to the end from the newest checkpoint; leaves ``final-<rank>.pt``."""
    torch.set_num_threads(1)
    saved = RolloutCheckpoint(str(root / "checkpoints"), every_n_rollouts=every_n_rollouts, keep=2)
    module = runs.module(
        GRPO,
        max_rollouts=ROLLOUTS,
        dynamic_sampling=DynamicSampling(max_rounds=1),
        kl=KL(reward_coef=0.01, target=0.001, horizon=100),
        schedule=Schedule("cosine"),
        sampling=Sampling(max_tokens=4),
    )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    several = RLFSDP2Strategy(allow_cpu=True) if SHARDED in os.environ else "rl_ddp"
    trainer = runs.trainer(
        root,
        callbacks=[saved, Clocked(clock)],
        logger=Record(root / "record.jsonl", saved),
        strategy=several if ranks > 1 else "auto",
        devices=ranks,
        limit_val_batches=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    with clock.running() if clock.counts else nullcontext():
        data = runs.data(batch_size=2, train_size=18, val_size=4 * ranks, val_batch_size=2)
        trainer.fit(module, data, ckpt_path=saved.newest(trainer))
    torch.save(state(module), root / f"final-{trainer.global_rank}.pt")


def state(module: RLModule) -> dict[str, object]:
    """Everything that an interruption must not change; of sharded tensors, this rank's shards."""
    optimizer = module.optimizers().optimizer
    found = {
        "weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": module.lr_schedulers().state_dict(),
        "kl_factor": module.state.kl_factor,
        "rounds": module.group_buffer.rounds,
        "step": module.trainer.global_step,
    }
    own: dict[str, object] = tree_map_only(DTensor, DTensor.to_local, found)
    return own


def record(root: Path) -> list[dict[str, object]]:
    """What was logged of each pass and validation, by all processes of the run."""
    path = root / "record.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def difference(a: object, b: object, place: str = "") -> str:
    """Where two results first differ, if only in the last bit; empty if they are equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if torch.equal(a, b) else place
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((found for k in a if (found := difference(a[k], b[k], f"{place}.{k}"))), "")
    return "" if a == b else f"{place}: {a} and {b}"


@contextmanager
def marking_writes(clock: Clock) -> Iterator[None]:
    """Let the clock count writing a checkpoint as a phase."""

    def marked(save: Callable[..., None]) -> Callable[..., None]:
        def marks(*args: object, **options: object) -> None:
            clock.phase_begins(WRITE)
            try:
                save(*args, **options)
            finally:
                clock.phase_ends(WRITE)

        return marks

    with ExitStack() as stack:
        for writer in (AtomicCheckpointIO, ShardedStrategy):
            save = marked(writer.save_checkpoint)
            stack.enter_context(patch.object(writer, "save_checkpoint", save))
        yield


def moments(spans: list[tuple[str, int]], calls: int) -> dict[str, list[range]]:
    """By phase, the ranges of calls that belong to it."""
    found: dict[str, list[range]] = {}
    ends = [start for _, start in spans[1:]] + [calls]
    for (phase, start), end in zip(spans, ends, strict=True):
        if end > start + 1:
            found.setdefault(phase, []).append(range(start + 1, end))
    return found


def kill(clock: Clock) -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
