"""Run by a test on each of two ranks: a short fit and a prediction with all callbacks; files go to ``sys.argv[1]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rllava_pl.callbacks import ExportHF, RolloutProgressBar, RolloutTable, RolloutWriter, RunSummary
from tests import runs


def main(root: Path) -> None:
    torch.set_num_threads(1)
    table = RolloutTable(num_prompts=2, samples=1, every_n_rollouts=1)
    callbacks = [RolloutProgressBar(1), table, ExportHF(every_n_rollouts=1), RunSummary(), RolloutWriter()]
    devices = int(os.environ["WORLD_SIZE"])
    trainer = runs.trainer(root, callbacks=callbacks, strategy="rl_ddp", devices=devices, enable_progress_bar=True)
    module, data = runs.module(max_rollouts=2), runs.data(val_size=3, test_size=5, val_batch_size=2)
    trainer.fit(module, data)
    (root / f"uids-{trainer.global_rank}").write_text(" ".join(table.state_dict()["uids"]))
    trainer.predict(module, data, return_predictions=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
        dist.barrier()
        dist.destroy_process_group()
