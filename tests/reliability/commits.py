"""Two ranks write a directory together; prints what happened on each.

python -m tests.reliability.commits
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch.distributed as dist

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.atomic import committed_directory
from tests.reliability import forks

RANKS = 2


def commit(root: Path, rank: int) -> None:
    """Three times; the second time with an error on the second rank."""
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    messages = []
    for attempt in range(3):
        try:
            with committed_directory(root / "a.ckpt", {"rollouts": attempt}) as temporary:
                (temporary / f"{rank}.bin").write_bytes(bytes(1000 + rank))
                if attempt == 1 and rank == 1:
                    raise OSError("disk full")
            messages.append("")
        except OSError as error:
            messages.append(str(error))
        found = manifest.check(root / "a.ckpt")
        messages.append([found.rollouts, found.world_size, sorted(found.files)])
        dist.barrier()
    (root / f"messages-{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        codes = forks.run(partial(commit, root), root / "log", RANKS)
        messages = [json.loads(path.read_text()) for path in sorted(root.glob("messages-*.json"))]
        left = sorted(path.name for path in root.iterdir())
        print(
            json.dumps({"codes": codes, "messages": messages, "left": left, "log": (root / "log").read_text()[-2000:]})
        )


if __name__ == "__main__":
    main()
