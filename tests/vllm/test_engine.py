"""The real engine: log-probs equal the trainer's before and after updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.vllm_build import build_llm
from rllava_pl.rollout.vllm_transfer import buckets
from rllava_pl.types import Sampling
from tests import runs
from tests.models.conftest import prompts
from tests.vllm.conftest import Bench, gap, on, perturb

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FAMILIES = ("idefics3", "qwen2_5_vl", "qwen3_vl")


@on(*FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_the_trainers_before_and_after_twenty_syncs(fresh: Bench, temperature: float) -> None:
    requests = fresh.mixed()
    gaps = [fresh.gap(requests, temperature)]
    for update in range(20):
        perturb(fresh.policy, scale=0.005)
        if update == 19:
            assert fresh.gap(requests, temperature)[0] > 1e-2  # else the test could not see a missing sync
        fresh.sync()
    gaps.append(fresh.gap(requests, temperature))
    assert all(largest <= 1e-4 and mean <= 1e-5 for largest, mean in gaps), gaps


@on("idefics3")
def test_greedy_sample_is_the_most_likely_for_every_seed(bench: Bench) -> None:
    requests = bench.requests(prompts([1, 0]), samples=2)
    rollouts = bench.generate(requests, Sampling(max_tokens=8, temperature=0.0))
    assert torch.equal(rollouts[0].response_ids, rollouts[1].response_ids)
    with torch.no_grad():
        inputs = bench.policy.collate([requests[0].inputs])
        logits = bench.policy.model(**inputs).logits[0, -1].index_fill(0, torch.tensor(bench.policy.banned_ids), -1e9)
    assert int(rollouts[0].response_ids[0]) == int(logits.argmax())
    assert gap(bench.policy, rollouts, samples=2)[0] <= 1e-4


@on("idefics3")
def test_sample_depends_on_its_seed_alone(bench: Bench) -> None:
    sampling = Sampling(max_tokens=8)
    first, again, other = (
        [tuple(r.response_ids.tolist()) for r in bench.generate(bench.mixed(stream=stream), sampling)]
        for stream in ("one", "one", "two")
    )
    assert first == again != other
    alone = bench.generate(bench.mixed(stream="one")[1:2], sampling)
    assert [tuple(r.response_ids.tolist()) for r in alone] == first[3:6]


@on("idefics3")
@pytest.mark.parametrize("samples", [1, 8])
def test_groups_of_any_size_are_in_order(bench: Bench, samples: int) -> None:
    requests = bench.requests(prompts([1, 0, 2]), samples=samples)
    rollouts = bench.generate(requests, Sampling(max_tokens=6))
    assert [r.group for r in rollouts] == [p for p in range(3) for _ in range(samples)]
    for rollout in rollouts:
        ended = int(rollout.response_ids[-1]) in bench.policy.stop_ids
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 6
    assert len({tuple(r.response_ids.tolist()) for r in rollouts[:samples]}) == min(samples, 2) or samples == 8


@on("idefics3", "qwen2_5_vl")
def test_banned_tokens_are_never_sampled(fresh: Bench) -> None:
    """Their logits are raised far above all others; the trainer must still give the same log-probs."""
    banned = torch.tensor(fresh.policy.banned_ids)
    with torch.no_grad():
        embeddings = fresh.policy.model.get_input_embeddings().weight
        embeddings[banned] += 0.3 * embeddings.mean(0)
    fresh.sync()
    rollouts = fresh.generate(fresh.mixed(samples=32), Sampling(max_tokens=8))
    drawn = torch.cat([rollout.response_ids for rollout in rollouts])
    assert len(banned) >= 3 and not torch.isin(drawn, banned).any()
    assert gap(fresh.policy, rollouts, samples=32)[0] <= 1e-4


@on("idefics3", "qwen3_vl")
def test_response_continues_given_tokens(bench: Bench) -> None:
    hint = tuple(bench.policy.encode_response("<answer>red").tolist()[:-1])
    requests = [dataclasses.replace(r, prefix_ids=hint) for r in bench.requests(prompts([1, 3, 0]))]
    assert bench.gap(requests)[0] <= 1e-4
    rollouts = bench.generate(requests, Sampling(max_tokens=8))
    assert all(tuple(r.response_ids[: len(hint)].tolist()) == hint for r in rollouts)
    assert all([s.origin for s in r.segments] == ["given", "sampled"] for r in rollouts)
    assert all(r.text.startswith("<answer>red") for r in rollouts)


@on("idefics3")
def test_prompt_tokens_other_than_the_trainers_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that are expanded already are expanded again by the engine, without an error."""
    requests = bench.requests(prompts([1]))
    monkeypatch.setattr("rllava_pl.rollout.common.unexpanded_ids", lambda *_: requests[0].inputs.input_ids_S.tolist())
    managed = ManagedEngine(lambda: bench.engine, bench.policy, lambda: iter(()), lambda: bench.engine.version)
    with pytest.raises(RuntimeError, match=r"prompt 'test:0': the engine read \d+ prompt tokens, the trainer \d+"):
        managed.generate(requests, Sampling(max_tokens=4))


@on("idefics3")
def test_request_that_does_not_fit_is_refused_with_the_arithmetic(bench: Bench) -> None:
    requests = bench.requests(prompts([1]))
    tokens = len(requests[0].inputs)
    message = (
        rf"prompt 'test:0': {tokens} prompt tokens \+ 0 given \+ sampling\.max_tokens 500 = {tokens + 500}, but .* 512"
    )
    with pytest.raises(ValueError, match=message):
        bench.generate(requests, Sampling(max_tokens=500))
    with pytest.raises(ValueError, match="prompt 'test:0' shows 4 images, but the engine takes 3"):
        bench.generate(bench.requests(prompts([4])), Sampling(max_tokens=4))
    misplaced = dataclasses.replace(requests[0], prefix_ids=(bench.policy.banned_ids[0],))
    with pytest.raises(ValueError, match=r"prefix_ids of prompt 'test:0' hold .* can continue text only"):
        bench.generate([misplaced], Sampling(max_tokens=4))


@on("idefics3")
@pytest.mark.parametrize("fault", ["the stream breaks", "an unknown name", "a wrong shape"])
def test_sampling_after_a_failed_sync_is_refused_until_one_is_complete(
    fresh: Bench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("rllava_pl.rollout.vllm.buckets", lambda tensors: buckets(tensors, limit_bytes=1))
    weights = dict(fresh.policy.model.state_dict())
    begun = list(weights.items())[:9]

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from begun
        raise OSError("the stream broke")

    streams = {
        "the stream breaks": breaking(),
        "an unknown name": [*begun, ("nowhere.weight", torch.zeros(1))],
        "a wrong shape": [*begun, ("lm_head.weight", torch.zeros(3, 3))],
    }
    with pytest.raises((OSError, ValueError, RuntimeError, AssertionError)):
        fresh.engine.sync(streams[fault], 7)
    with pytest.raises(RuntimeError, match="there was no complete sync"):
        fresh.generate(fresh.mixed(), Sampling(max_tokens=4))
    fresh.engine.sync(weights.items(), 8)
    assert fresh.gap(fresh.mixed())[0] <= 1e-4


@on("idefics3")
def test_settings_of_torch_are_unchanged(bench: Bench) -> None:
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@on("adapter")
def test_adapters_alone_are_synchronised(fresh: Bench) -> None:
    requests = fresh.mixed()
    for only in ("lora_B", "lora_A", "lora_B"):
        perturb(fresh.policy, only, scale=0.1)
        assert fresh.gap(requests)[0] > 1e-3
        fresh.sync()
        largest, mean = fresh.gap(requests)
        assert largest <= 1e-4 and mean <= 1e-5


def start(path: str) -> None:
    common = {"dtype": "float32", "context_tokens": 512, "images": 1, "kv_cache_gib": 1 / 16, "memory": "resident"}
    build_llm(path, **common, enforce_eager=True, seed=0)


def test_model_that_vllm_cannot_load_is_refused_with_a_remedy() -> None:
    source = runs.tiny("llava")
    source.prepare(1)
    with pytest.raises(ValueError, match=r"vLLM cannot load the weights of .*Use the embedded engine for this model"):
        start(source.path)


def test_unsupported_head_size_is_refused_before_loading(tmp_path) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    AutoConfig.for_model("llama", **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has head_dim 16, and vLLM's attention on a CPU supports \[32, 64,"):
        start(str(tmp_path))
