"""Run by a test on each of two ranks: one sync, of weights that both must gather, and a rollout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from rllava_pl.models import VLM
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.vllm_http import ServerError
from rllava_pl.rollout.vllm_server import VLLMServerEngine
from rllava_pl.types import Request, Sampling
from tests.models.conftest import prompts


def sharded(gathered: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """A stream that only advances when both ranks read it."""
    part = torch.full((2,), float(dist.get_rank()))
    parts = [torch.empty(2) for _ in range(2)]
    dist.all_gather(parts, part)
    gathered.append("a.weight")
    yield "a.weight", torch.cat(parts)


def main(root: Path, model: str, url: str) -> str:
    policy = VLM(model).load()
    engine = VLLMServerEngine([url], policy)
    gathered: list[str] = []
    try:
        engine.sync(sharded(gathered), 2)
    except ServerError as error:
        return str(error)
    prompt, (inputs,) = (batch := prompts([0]))[0], policy.encode(batch)
    (rollout,) = run_episodes(engine, policy, [Request(prompt, inputs, 0, (1,))], Sampling(max_tokens=4))
    return f"gathered {' '.join(gathered)} on both, sampled with {rollout.weight_versions[0]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    (Path(sys.argv[1]) / f"rank-{dist.get_rank()}").write_text(result)
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads must not outlive the process: an exit at a bad moment would abort it
