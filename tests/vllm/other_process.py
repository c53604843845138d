"""Run by a test: an engine in another process samples before and after a sync; prints the largest gaps."""

from __future__ import annotations

from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_build import in_process
from tests import runs
from tests.vllm.conftest import Bench, build, perturb


def main() -> None:
    source = runs.tiny()
    source.prepare(1)
    policy = source.load()
    bench = Bench(policy, VLLMEngine(build(source.path), policy))
    assert not in_process(bench.engine.llm)
    bench.sync()
    before = bench.gap(bench.mixed())[0]
    perturb(bench.policy)
    bench.sync()
    print("gaps", before, bench.gap(bench.mixed())[0])
    bench.engine.close()


if __name__ == "__main__":  # the engine's process imports this file again
    main()
