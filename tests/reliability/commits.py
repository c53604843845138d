"""Two ranks write a directory together; prints what each of them saw.

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
    """Once well, once with an error on the second rank, once more well."""
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    said = []
    for attempt in range(3):
        try:
            with committed_directory(root / "a.ckpt", {"rollouts": attempt}) as draft:
                (draft / f"{rank}.bin").write_bytes(bytes(1000 + rank))
                if attempt == 1 and rank == 1:
                    raise OSError("disk full")
            said.append("")
        except OSError as error:
            said.append(str(error))
        found = manifest.check(root / "a.ckpt")
        said.append([found.rollouts, found.world_size, sorted(found.files)])
        dist.barrier()
    (root / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        codes = forks.run(partial(commit, root), root / "log", RANKS)
        said = [json.loads(path.read_text()) for path in sorted(root.glob("said-*.json"))]
        left = sorted(path.name for path in root.iterdir())
        print(json.dumps({"codes": codes, "said": said, "left": left, "log": (root / "log").read_text()[-2000:]}))


if __name__ == "__main__":
    main()
