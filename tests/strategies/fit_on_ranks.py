"""Run by the tests on each of several ranks: short fits, results written by rank to ``sys.argv[1]``.

Options come as ``name=value`` pairs: ``strategy``, ``batch_size`` (prompts a rank), ``algorithms`` (one after the
other), ``unscorable`` (uids).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rllava_pl import modules
from rllava_pl.loop.options import Batching, DynamicSampling
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Rollout, Score
from tests import runs


class Accuracy(AnswerTagReward):
    """The usual reward; it cannot score some rows."""

    unscorable: frozenset[str] = frozenset()

    def score(self, rollout: Rollout) -> Score:
        return Score(None, reason="no_label") if rollout.prompt.uid in self.unscorable else super().score(rollout)


OPTIONS: dict[str, dict[str, object]] = {
    "ClipCov": {"ratio": 0.1, "lower": 0.0, "upper": 100.0},
    "KLCov": {"ratio": 0.1},
    "DAPO": {"dynamic_sampling": DynamicSampling(max_rounds=3)},
    "PPO": {"critic_lr_factor": 0.1},  # x 0.5, which is a lot for a head
}
"""Where the defaults would leave nothing to compare within 3 rollouts of 12 samples."""


def fit(root: Path, strategy: str, batch_size: int, algorithm: str) -> None:
    module = runs.module(
        getattr(modules, algorithm),
        rewards=[Accuracy()],
        max_rollouts=3,
        batching=Batching(),
        max_grad_norm=0.5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),  # Adam amplifies rounding
        **OPTIONS.get(algorithm, {}),
    )
    uids: list[str] = []
    trained: list[int] = []
    training_step, minibatches = module.training_step, module.minibatches
    module.training_step = lambda prompts, batch_idx: (
        uids.extend(p.uid for p in prompts),
        training_step(prompts, batch_idx),
    )[1]
    module.minibatches = lambda batch: (trained.append(len(batch)), minibatches(batch))[1]
    trainer = runs.trainer(
        root,
        strategy=strategy,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=3,
    )
    share = runs.share_of_targets(type(module))
    trainer.fit(module, runs.data(batch_size=batch_size, val_size=5, val_batch_size=2, demonstrations=share))
    rank = trainer.global_rank
    torch.save({n: p.detach() for n, p in module.named_parameters()}, root / f"weights-{algorithm}-{rank}.pt")
    own = ("time/", "train/micro_batch_size")  # ranks divide their own rows
    metrics = {n: float(x) for n, x in trainer.callback_metrics.items() if not n.startswith(own)}
    result = {"uids": uids, "trained": trained, "metrics": metrics}
    (root / f"result-{algorithm}-{rank}.json").write_text(json.dumps(result))


def main(root: Path, strategy: str, batch_size: int, algorithms: str, unscorable: str) -> None:
    torch.set_num_threads(1)
    Accuracy.unscorable = frozenset(unscorable.split(","))
    for algorithm in algorithms.split(","):
        fit(root, strategy, batch_size, algorithm)


if __name__ == "__main__":
    options = dict(pair.split("=", 1) for pair in sys.argv[2:])
    main(
        Path(sys.argv[1]),
        options["strategy"],
        int(options["batch_size"]),
        options.get("algorithms", "GRPO"),
        options.get("unscorable", ""),
    )
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
