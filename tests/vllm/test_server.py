"""Rollouts from a real vLLM server on loopback: equal log-probs, new weights, and what happens when it dies."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.callbacks import RolloutCheckpoint, VLLMServerRollout
from rllava_pl.models.trainable import hf_weights
from rllava_pl.rollout import vllm_routes
from rllava_pl.rollout.vllm_http import EventLoop, RequestLimits, ServerError
from rllava_pl.rollout.vllm_server import VLLMServerEngine
from rllava_pl.types import Sampling
from tests import runs
from tests.models.conftest import prompts
from tests.rollout.fake_vllm import GENERATE, FakeVLLM, Json, fake_vllm
from tests.vllm.conftest import Bench, perturb
from tests.vllm.servers import SMALL, RealServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NAMED_WITHIN_SECONDS = 30.0


def model_path() -> str:
    source = runs.tiny()
    source.prepare(1)
    return source.path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(model_path(), tmp_path_factory.mktemp("vllm") / "server.log")
    yield server
    server.kill()


@pytest.fixture
def server(real: RealServer) -> RealServer:
    """Running, also where the test before has killed it."""
    if not real.running:
        real.start()
    return real


@pytest.fixture
def bench(server: RealServer) -> Iterator[Bench]:
    """A policy whose weights the server has."""
    source = runs.tiny()
    source.prepare(1)
    policy = source.load()
    bench = Bench(policy, VLLMServerEngine([server.url], policy, images=3))
    bench.sync()
    yield bench
    bench.engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_the_trainers_before_and_after_syncs(bench: Bench, temperature: float) -> None:
    requests = bench.mixed()  # 0 to 3 pictures, and one prompt of more than a cache block
    gaps = [bench.gap(requests, temperature)]
    for _ in range(5):
        perturb(bench.policy)
        bench.sync()
    gaps.append(bench.gap(requests, temperature))
    assert all(largest <= 1e-4 and mean <= 1e-5 for largest, mean in gaps), gaps


def test_stale_weights_change_log_probs(bench: Bench) -> None:
    perturb(bench.policy)
    assert bench.gap(bench.mixed())[0] > 1e-2
    bench.sync()
    assert bench.gap(bench.mixed())[0] <= 1e-4


@pytest.mark.parametrize("part", ["vision", "connector", "embed_tokens"])  # the last is the head as well: they are tied
def test_every_part_of_the_model_is_synchronised(bench: Bench, part: str) -> None:
    requests = bench.mixed()
    bench.gap(requests)
    perturb(bench.policy, only=part, scale=0.3)
    assert bench.gap(requests)[0] > 1e-2  # and the caches are filled with the old weights
    bench.sync()
    assert bench.gap(requests)[0] <= 1e-4


def test_sample_depends_on_its_seed_alone(bench: Bench) -> None:
    sampling = Sampling(max_tokens=8)
    first, again, other = (
        [tuple(r.response_ids.tolist()) for r in bench.generate(bench.mixed(stream=stream), sampling)]
        for stream in ("one", "one", "two")
    )
    assert first == again != other


def test_banned_tokens_are_never_sampled_and_the_budget_holds(bench: Bench) -> None:
    with torch.no_grad():
        bench.policy.model.lm_head.weight.zero_()  # all tokens are equally likely
    bench.sync()
    rollouts = bench.generate(bench.requests(prompts([0, 1]), samples=16), Sampling(max_tokens=100))
    sampled = {token for rollout in rollouts for token in rollout.response_ids.tolist()}
    vocabulary = bench.policy.model.config.text_config.vocab_size
    assert sampled > set(range(vocabulary // 2)) - set(bench.policy.banned_ids) - set(bench.policy.stop_ids)
    assert not sampled & set(bench.policy.banned_ids)
    for rollout in rollouts:
        ended = int(rollout.response_ids[-1]) in bench.policy.stop_ids
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 100
    allowed = vocabulary - len(bench.policy.banned_ids)
    logp = torch.cat([rollout.engine_logprobs for rollout in rollouts])
    assert logp == pytest.approx(torch.full_like(logp, -torch.tensor(float(allowed)).log()), abs=1e-4)


class Relay(FakeVLLM):
    """A second address of the real server: forwards requests for samples and takes no part in syncs."""

    def __init__(self, to: RealServer) -> None:
        super().__init__()
        self.to, self.context_tokens = to, 512

    def samples(self, body: Json) -> Json:
        request = urllib.request.Request(self.to.url + GENERATE, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


def test_requests_alternate_between_servers(bench: Bench, server: RealServer) -> None:
    with fake_vllm(Relay(server)) as relay:
        engine = VLLMServerEngine([server.url, relay.url], bench.policy, images=3)
        engine.sync(hf_weights(bench.policy.model), 1)
        relay.asked.clear()
        assert Bench(bench.policy, engine).gap(bench.mixed())[0] <= 1e-4
        engine.close()
    assert len(relay.posted(GENERATE)) == 2  # of five


def test_sync_after_an_interrupted_one_repairs_the_server(bench: Bench) -> None:
    """The stream ends with an unknown weight when half of a fused layer has arrived, with other values."""
    whole = list(hf_weights(bench.policy.model))
    cut = next(k for k, (name, _) in enumerate(whole) if "text_model.layers.0.self_attn.k_proj" in name)
    half = [(name, torch.randn_like(x)) for name, x in whole[:cut]]
    with pytest.raises(ServerError, match=r"answered 500 at the weights of update 7: "):
        bench.engine.sync([*half, ("model.no_such_layer.weight", torch.zeros(1))], 7)
    with pytest.raises(RuntimeError, match="there was no complete sync"):
        bench.gap(bench.mixed())
    bench.sync()
    assert bench.gap(bench.mixed())[0] <= 1e-4


def test_update_left_open_by_a_dead_trainer_is_ended(bench: Bench, server: RealServer) -> None:
    loop, (client,) = EventLoop(), bench.engine.servers
    loop.run(vllm_routes.begin(client, "a test"))
    loop.close()
    engine = VLLMServerEngine([server.url], bench.policy, images=3)
    engine.sync(hf_weights(bench.policy.model), 1)
    assert Bench(bench.policy, engine).gap(bench.mixed())[0] <= 1e-4
    engine.close()
    with pytest.raises(ServerError, match=r"sampled with the weights \['1-\w+'\], not with '0-\w+'; the server "):
        bench.gap(bench.mixed())  # the engine that was here first


def processes(server: RealServer, kind: str) -> list[psutil.Process]:
    """All of a server, or what does the computing behind the process that answers."""
    front = psutil.Process(server.pid)
    behind = front.children(recursive=True)
    return behind if kind == "engine" else [front, *behind]


@pytest.mark.parametrize("kind", ["server", "engine"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_server_lost_in_a_rollout_is_named_with_its_request(
    bench: Bench, server: RealServer, kind: str, number: signal.Signals
) -> None:
    with torch.no_grad():
        bench.policy.model.lm_head.weight.zero_()  # responses are as long as they may
    bench.sync()
    lost = processes(server, kind)
    timer = threading.Timer(0.5, lambda: [process.send_signal(number) for process in lost])
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(ServerError, match=rf"{re.escape(server.url)} .*16 samples of prompt 'test:") as error:
            bench.generate(bench.requests(prompts([1, 0, 1]), samples=16), Sampling(max_tokens=400))
        assert time.monotonic() - start < NAMED_WITHIN_SECONDS, error.value
    finally:
        timer.join()
        if number == signal.SIGSTOP:  # the processes resume, but no client waits for them
            for process in lost:
                process.send_signal(signal.SIGCONT)
        else:
            server.kill()
    if number == signal.SIGSTOP:
        bench.sync()
        assert bench.gap(bench.mixed())[0] <= 1e-4


class KillAfter(Callback):
    """Kills the server after a number of rollouts."""

    def __init__(self, server: RealServer, rollouts: int) -> None:
        self.server, self.rollouts = server, rollouts

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if pl_module.state.rollouts == self.rollouts:
            self.server.kill()


def test_run_that_lost_its_server_resumes_from_its_checkpoint(server: RealServer, tmp_path: Path) -> None:
    def fit(*more: Callback, **options: object) -> tuple[LightningModule, str]:
        saving = RolloutCheckpoint(str(tmp_path / "ckpt"), every_n_rollouts=1)
        rollouts = VLLMServerRollout([server.url], images_per_prompt=3, sync_check_every=1)
        module = runs.module(max_rollouts=4)
        runs.trainer(tmp_path, callbacks=[rollouts, saving, *more]).fit(module, runs.data(), **options)
        return module, saving.last_path

    with pytest.raises(ServerError, match=f"vLLM server {server.url} could not be reached for the weights of update 4"):
        fit(KillAfter(server, 2))
    (last,) = sorted((tmp_path / "ckpt").glob("rollout-*.ckpt"))[-1:]
    assert last.name == "rollout-000002.ckpt"
    server.start()
    module, _ = fit(ckpt_path=last)
    assert module.state.rollouts == 4 and module.state.updates == 8


def test_server_without_needed_options_is_refused_with_the_command(real: RealServer, tmp_path: Path) -> None:
    real.kill()  # one at a time
    policy = runs.tiny()
    policy.prepare(1)
    plain = RealServer(policy.path, tmp_path / "log", (*SMALL, "--enable-scale-out"), dev_mode=False)
    plain.start()
    engine = VLLMServerEngine([plain.url], loaded := policy.load(), limits=RequestLimits(max_retries=0))
    loop = EventLoop()
    try:
        with pytest.raises(ServerError, match=r"answered 404 .* not run in development mode\. Start it with: VLLM"):
            engine.sync(hf_weights(loaded.model), 0)
        with pytest.raises(ServerError, match="gives log-probs before temperature and bans"):
            loop.run(vllm_routes.probe(engine.servers[0], loaded.stop_ids[0]))
    finally:
        loop.close()
        engine.close()
        plain.kill()
