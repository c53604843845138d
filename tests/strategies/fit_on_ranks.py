"""Run by the tests on each of several ranks: a short fit, results written by rank to ``sys.argv[1]``.

Options come as ``name=value`` pairs: ``strategy``, ``batch_size`` (prompts a rank), ``algorithm``, ``unscorable``
(uids).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rllava_pl import modules
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Rollout, Score
from tests import runs


class Accuracy(AnswerTagReward):
    """The usual reward, which cannot score some rows."""

    unscorable: frozenset[str] = frozenset()

    def score(self, rollout: Rollout) -> Score:
        return Score(None, reason="no_label") if rollout.prompt.uid in self.unscorable else super().score(rollout)


def main(root: Path, strategy: str, batch_size: int, algorithm: str, unscorable: str) -> None:
    torch.set_num_threads(1)
    module = runs.module(
        getattr(modules, algorithm),
        max_rollouts=3,
        minibatches=1,
        max_grad_norm=0.5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),  # Adam blows rounding up
    )
    module.rewards = [Accuracy()]
    Accuracy.unscorable = frozenset(unscorable.split(","))
    uids: list[str] = []
    sample = module.rollout
    module.rollout = lambda prompts: (uids.extend(p.uid for p in prompts), sample(prompts))[1]
    trainer = runs.trainer(
        root,
        strategy=strategy,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=3,
    )
    trainer.fit(module, runs.data(batch_size=batch_size, val_size=5, val_batch_size=2))
    rank = trainer.global_rank
    torch.save({n: p.detach() for n, p in module.policy.named_parameters()}, root / f"weights-{rank}.pt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("time/")}
    (root / f"result-{rank}.json").write_text(json.dumps({"uids": uids, "metrics": metrics}))


if __name__ == "__main__":
    given = dict(pair.split("=", 1) for pair in sys.argv[2:])
    main(
        Path(sys.argv[1]),
        given["strategy"],
        int(given["batch_size"]),
        given.get("algorithm", "GRPO"),
        given.get("unscorable", ""),
    )
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
