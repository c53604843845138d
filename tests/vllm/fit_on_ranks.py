"""Run by a test on each of two ranks: a short fit with an engine each; results are written to ``sys.argv[1]``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from rllava_pl.callbacks import VLLMRollout
from tests import runs


class Rewards(Callback):
    """The mean reward of every rollout."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append(float(trainer.callback_metrics["train/reward"]))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    rewards, samples = Rewards(), {}
    module = runs.module(
        max_rollouts=45, group_size=8, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    )
    sample = module.sample

    def recorded(prompts):
        rollouts = sample(prompts)
        samples.setdefault("first", [(r.prompt.uid, r.response_ids.tolist()) for r in rollouts])
        return rollouts

    module.sample = recorded
    engine = VLLMRollout(context_tokens=512, kv_cache_gib=1 / 16, sync_check_every=20)
    trainer = runs.trainer(root, callbacks=[engine, rewards], strategy="rl_ddp", devices=int(os.environ["WORLD_SIZE"]))
    trainer.fit(module, runs.data(batch_size=12, train_size=384))
    assert dist.is_initialized()  # closing the engine has left the trainer's group alone
    dist.barrier()
    rank = trainer.global_rank
    torch.save({n: p.detach() for n, p in module.policy.named_parameters()}, root / f"weights-{rank}.pt")
    (root / f"result-{rank}.json").write_text(json.dumps({"rewards": rewards.seen, **samples}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
