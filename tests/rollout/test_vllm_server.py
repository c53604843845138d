"""The client of vLLM servers against a small real HTTP server; what a real vLLM answers is in tests/vllm."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("httpx", reason="the HTTP client is not installed; pip install 'rllava-pl[vllm-server]'")
pytest.importorskip("tenacity", reason="the HTTP client is not installed; pip install 'rllava-pl[vllm-server]'")

from rllava_pl.callbacks import RolloutCallback, RolloutCheckpoint, VLLMServerRollout
from rllava_pl.cli import main
from rllava_pl.cli.app import RLCLI
from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.rollout import vllm_http
from rllava_pl.rollout.episodes import run_episodes
from rllava_pl.rollout.vllm_http import RequestLimits, ServerError, base_url, check_host
from rllava_pl.rollout.vllm_server import VLLMServerEngine, image_parts
from rllava_pl.rollout.vllm_transfer import from_text
from rllava_pl.types import Request, Rollout, Sampling
from tests.models.conftest import picture, prompts
from tests.rollout.fake_vllm import GENERATE, FakeVLLM, error, fake_vllm

ROOT = Path(__file__).parents[2]
OVERLAID = ["--config", "quickstart", "--config", "engines/vllm_server"]
SAMPLING = Sampling(max_tokens=4, temperature=0.7)
WEIGHTS = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("lm_head.weight", torch.ones(2, dtype=torch.bfloat16))]
UPDATE = ["/is_paused", "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
SERVE = ["/reset_prefix_cache", "/reset_encoder_cache", "/resume"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(vllm_http, "POLL_SECONDS", 0.05)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with fake_vllm() as server:
        yield server


@pytest.fixture(scope="module")
def policy(load: Callable[..., Policy]) -> Policy:
    return load("idefics3")


@pytest.fixture
def engine(server: FakeVLLM, policy: Policy) -> Iterator[VLLMServerEngine]:
    """Synchronised with the server."""
    engine = VLLMServerEngine([server.url], policy, limits=RequestLimits(silence_seconds=0.5))
    engine.sync(WEIGHTS, 3)
    server.asked.clear()
    yield engine
    engine.close()


def requests(policy: Policy, images: list[int], samples: int = 2, **options: object) -> list[Request]:
    batch = prompts(images)
    seeds = [tuple(10 * p + k for k in range(samples)) for p in range(len(batch))]
    return [
        Request(q, x, p, seeds[p], **options) for p, (q, x) in enumerate(zip(batch, policy.encode(batch), strict=True))
    ]


def generate(engine: VLLMServerEngine, batch: list[Request], sampling: Sampling = SAMPLING) -> list[Rollout]:
    return run_episodes(engine, engine.policy, batch, sampling)


# -- addresses --


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://user:key@127.0.0.1", "http://127.0.0.1:8000/?key=1"]
)
def test_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{url!r} is no address of a server; write http://host:port")):
        VLLMServerRollout([url])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.9", "172.16.0.1", "[::1]", "[fd00::1]"]
)
def test_loopback_and_private_addresses_are_allowed(host: str) -> None:
    check_host(f"http://{host}:8000", allow_remote=False)


@pytest.mark.parametrize("host", ["8.8.8.8", "[2001:4860:4860::8888]", "[::ffff:8.8.8.8]"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_public_address_is_refused_unless_allowed(scheme: str, host: str) -> None:
    url = f"{scheme}://{host}:8000"
    with pytest.raises(
        ValueError, match=r"is at the public address .*8, where others could replace .* allow_remote: true"
    ):
        check_host(url, allow_remote=False)
    check_host(url, allow_remote=True)


def test_host_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(
        ServerError, match=r"vLLM server http://nowhere\.invalid:1: the host name 'nowhere\.invalid' has no"
    ):
        check_host("http://nowhere.invalid:1", allow_remote=False)


def test_trailing_slash_of_a_url_is_ignored() -> None:
    assert base_url("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty; name at least one vLLM server"),
        ({"urls": ["http://h:1", "http://h:1/"]}, "urls names a server twice"),
        ({"concurrency": 0}, "concurrency is 0; a server must be given at least 1 request"),
        ({"max_retries": -1}, "max_retries is -1; use 0 for a single attempt"),
        ({"silence_seconds": 0.0}, "silence_seconds is 0 and request_seconds 1800; both must be positive"),
        ({"sync_check_every": -1}, r"sync_check_every \(-1\) and sync_check_limit \(0.0\) must not be negative"),
    ],
)
def test_invalid_options_are_refused_at_construction(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServerRollout(**({"urls": ["http://127.0.0.1:1"]} | options))


@pytest.mark.parametrize("package", ["httpx", "tenacity"])
def test_missing_http_client_says_what_to_install(
    package: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"need {package}, which is not .* pip install 'rllava-pl\[vllm-server\]'"
    ):
        VLLMServerEngine(["http://127.0.0.1:1"], policy)


def test_overlay_adds_the_callback_to_those_of_the_config_below(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(RLCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main(["fit", *OVERLAID, f"--trainer.default_root_dir={tmp_path}"])
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback))
    assert isinstance(callback, VLLMServerRollout) and callback.urls == ["http://127.0.0.1:8000"]
    assert any(isinstance(callback, RolloutCheckpoint) for callback in cli.trainer.callbacks)


# -- samples --


def test_request_carries_ids_images_and_every_sampling_parameter(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy
) -> None:
    (asked,) = requests(policy, [2], samples=3)
    engine.start([asked], SAMPLING)
    engine.advance()
    (body,) = server.posted(GENERATE)
    assert body["token_ids"] == unexpanded_ids(policy.processor, asked.prompt) != asked.inputs.input_ids_S.tolist()
    assert [part["type"] for part in body["content_parts"]] == ["image_url"] * 2
    assert body["return_token_ids"] is True and "model" not in body
    assert body["sampling_params"] == {
        "n": 3,
        "seed": 0,
        "max_tokens": 4,
        "min_tokens": 0,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "logit_bias": {str(i): -100.0 for i in policy.banned_ids},
        "ignore_eos": True,
        "stop_token_ids": list(policy.stop_ids),
        "detokenize": False,
    }


def test_images_are_sent_losslessly() -> None:
    (part,) = image_parts([picture(3)])
    data = base64.b64decode(part["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == picture(3).tobytes()


def test_answer_becomes_rollouts_in_the_order_of_the_seeds(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy
) -> None:
    first, second = generate(engine, asked := requests(policy, [0]))
    assert first.response_ids.tolist() == [7, 2] and first.engine_logprobs.tolist() == [-0.5, -1.0]
    assert asked[0].inputs.input_ids_S.tolist() == server.posted(GENERATE)[0]["token_ids"]
    assert (first.finish_reason, first.weight_versions, first.group) == ("stop", (3,), 0)
    assert first.sampled_mask.tolist() == [True, True]
    assert first.text == policy.decode(torch.tensor([7, 2]))
    assert second.prompt is first.prompt


def test_given_tokens_are_sent_and_begin_the_response(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy
) -> None:
    rollout, _ = generate(engine, asked := requests(policy, [0], prefix_ids=(30, 31)))
    prompt = asked[0].inputs.input_ids_S.tolist()
    assert server.posted(GENERATE)[0]["token_ids"] == [*prompt, 30, 31]
    assert rollout.response_ids.tolist() == [30, 31, 7, 2]
    assert rollout.engine_logprobs.tolist() == [0.0, 0.0, -0.5, -1.0]
    assert [segment.origin for segment in rollout.segments] == ["given", "sampled"]
    assert rollout.sampled_mask.tolist() == [False, False, True, True]


def test_greedy_sample_is_requested_once_a_group(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    rollouts = generate(engine, requests(policy, [0], samples=3), Sampling(max_tokens=4, temperature=0.0))
    assert server.posted(GENERATE)[0]["sampling_params"]["n"] == 1 and len(rollouts) == 3


def test_requests_alternate_between_servers_also_over_calls(policy: Policy) -> None:
    with fake_vllm() as one, fake_vllm() as two:
        engine = VLLMServerEngine([one.url, two.url], policy)
        engine.sync(WEIGHTS, 0)
        one.asked.clear(), two.asked.clear()
        rollouts = generate(engine, requests(policy, [0] * 5))
        generate(engine, requests(policy, [0]))
        engine.close()
        assert [rollout.prompt.uid for rollout in rollouts] == [f"test:{p}" for p in range(5) for _ in range(2)]
        assert [len(server.posted(GENERATE)) for server in (one, two)] == [3, 3]


@pytest.mark.parametrize("status", sorted(vllm_http.BUSY))
def test_request_to_a_busy_server_is_retried(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy, status: int
) -> None:
    server.trouble[GENERATE] = [(status, error("busy"))] * 3
    assert len(generate(engine, requests(policy, [0]))) == 2
    assert len(server.posted(GENERATE)) == 4


def test_request_fails_after_its_retries(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    server.trouble[GENERATE] = [(503, error("busy"))] * 9
    with pytest.raises(
        ServerError, match=rf"vLLM server {server.url} answered 503 at the 2 samples of prompt 'test:0': busy"
    ):
        generate(engine, requests(policy, [0]))
    assert len(server.posted(GENERATE)) == 1 + 3


def test_refused_request_is_not_retried(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    server.trouble[GENERATE] = [(400, error("Token id 9 is out of vocabulary"))]
    with pytest.raises(ServerError, match=r"answered 400 at .* prompt 'test:0': Token id 9 is out of vocabulary$"):
        generate(engine, requests(policy, [0]))
    assert len(server.posted(GENERATE)) == 1


SPOILT = {
    "other weights": (
        {"weight_versions": [{"version": "default", "start": 0, "end": 2}]},
        r"weights \['default'\], not",
    ),
    "no weights named": ({"weight_versions": None}, r"sampled with the weights \[\], not with '3-"),
    "other log-probs": ({"token_ids": [7, 3]}, "the log-probs are of other tokens"),
    "no log-probs": ({"logprobs": None}, "prompt 'test:0': "),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_invalid_answer_names_server_and_prompt(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy, change: dict[str, object], message: str
) -> None:
    answer = server.samples({"token_ids": [1], "sampling_params": {"n": 2}})
    answer["choices"] = [choice | change for choice in answer["choices"]]
    server.trouble[GENERATE] = [(200, answer)]
    with pytest.raises(
        ServerError, match=f"vLLM server {server.url} at the 2 samples of prompt 'test:0': .*{message}|{message}"
    ):
        generate(engine, requests(policy, [0]))


def test_too_few_samples_are_refused(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    answer = server.samples({"token_ids": [1], "sampling_params": {"n": 2}})
    server.trouble[GENERATE] = [(200, answer)]
    with pytest.raises(ServerError, match="prompt 'test:0': 3 samples were requested and 2 came"):
        generate(engine, requests(policy, [0], samples=3))


def test_answer_that_is_not_json_is_quoted(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    server.trouble[GENERATE] = [(200, "<html>")]
    with pytest.raises(ServerError, match="prompt 'test:0' answered something that is not JSON: '<html>'"):
        generate(engine, requests(policy, [0]))


def test_request_that_does_not_fit_is_refused_before_it_is_sent(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy
) -> None:
    prompt = len(requests(policy, [0])[0].inputs)
    message = (
        rf"{prompt} prompt tokens \+ 0 given \+ sampling\.max_tokens 64 = .* has 64; raise --max-model-len of the serv"
    )
    with pytest.raises(ValueError, match=message):
        generate(engine, requests(policy, [0]), Sampling(max_tokens=64))
    engine.images = 1
    with pytest.raises(
        ValueError, match="prompt 'test:0' shows 2 images, but the engine takes 1; raise images_per_prompt"
    ):
        generate(engine, requests(policy, [2]))
    with pytest.raises(ValueError, match=r"prefix_ids of prompt 'test:0' hold .* an end token"):
        generate(engine, requests(policy, [0], prefix_ids=(policy.stop_ids[0],)))
    assert server.asked == []


# -- dead and hung --


def test_hung_server_is_named_with_its_request(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    server.hung.set()
    message = (
        rf"vLLM server {server.url} did not answer health checks for 0\.5 s; it hangs or is gone, at the 2 samples of "
        r"prompt 'test:0' and 2 more requests"
    )
    with pytest.raises(ServerError, match=message):
        generate(engine, requests(policy, [0] * 3))


def test_dead_server_is_named_with_its_request(policy: Policy) -> None:
    with fake_vllm() as server:
        engine = VLLMServerEngine([server.url], policy, limits=RequestLimits(max_retries=1))
        engine.sync(WEIGHTS, 0)
    with pytest.raises(
        ServerError, match=f"vLLM server {server.url} could not be reached for the 2 samples of prompt 'test:0'"
    ):
        generate(engine, requests(policy, [0]))
    engine.close()


def test_server_whose_engine_died_is_named(engine: VLLMServerEngine, server: FakeVLLM, policy: Policy) -> None:
    server.trouble["/health"] = [(503, None)]
    server.samples = lambda body: server.over.wait()  # the request is never answered
    with pytest.raises(
        ServerError, match=rf"the engine of vLLM server {server.url} has died \(/health answers 503\), at the 2"
    ):
        generate(engine, requests(policy, [0]))


def test_request_to_a_healthy_server_times_out(server: FakeVLLM, policy: Policy) -> None:
    engine = VLLMServerEngine([server.url], policy, limits=RequestLimits(request_seconds=0.3))
    engine.sync(WEIGHTS, 0)
    server.samples = lambda body: server.over.wait()
    with pytest.raises(ServerError, match=r"did not answer within 0\.3 s at the 2 samples of prompt 'test:0'"):
        generate(engine, requests(policy, [0]))
    assert len(server.posted(GENERATE)) == 2 + 1  # the probes, and one attempt
    engine.close()


# -- weights --


def test_sync_uses_the_routes_in_order(server: FakeVLLM, policy: Policy) -> None:
    engine = VLLMServerEngine([server.url], policy)
    engine.sync(WEIGHTS, 5)
    assert server.paths == ["/v1/models", "/init_weight_transfer_engine", *UPDATE, *SERVE, GENERATE, GENERATE]
    assert engine.version == 5 and server.label.startswith("5-")
    (sent,) = server.posted("/update_weights")
    received = dict(from_text(sent["update_info"]["weights"]))
    assert received.keys() == dict(WEIGHTS).keys()
    assert all(torch.equal(received[name], x) and received[name].dtype == x.dtype for name, x in WEIGHTS)
    server.asked.clear()
    engine.sync(WEIGHTS, 6)
    assert server.paths == [*UPDATE, *SERVE]  # a known server is not looked at again
    engine.close()


def test_sampling_before_a_sync_is_refused(server: FakeVLLM, policy: Policy) -> None:
    engine = VLLMServerEngine([server.url], policy)
    with pytest.raises(RuntimeError, match="the engine's weights are not the policy's: there was no complete sync"):
        generate(engine, requests(policy, [0]))
    engine.close()


@pytest.mark.parametrize("path", [*UPDATE[1:], *SERVE])
def test_sampling_after_a_failed_sync_is_refused_until_one_is_complete(
    engine: VLLMServerEngine, server: FakeVLLM, policy: Policy, path: str
) -> None:
    server.trouble[path] = [(500, error("no"))]
    stream = iter(WEIGHTS)
    with pytest.raises(ServerError, match=f"vLLM server {server.url} answered 500 at the weights of update 4: no"):
        engine.sync(stream, 4)
    assert list(stream) == []  # the rest is gathered as well, on all ranks
    assert len(server.posted(path)) == 1  # never sent twice
    with pytest.raises(RuntimeError, match="there was no complete sync"):
        generate(engine, requests(policy, [0]))
    engine.sync(WEIGHTS, 4)
    assert {rollout.weight_versions for rollout in generate(engine, requests(policy, [0]))} == {(4,)}


@pytest.mark.parametrize("updating", [True, False])
def test_interrupted_update_is_ended_before_the_next(server: FakeVLLM, policy: Policy, updating: bool) -> None:
    server.paused, server.updating = True, updating
    engine = VLLMServerEngine([server.url], policy)
    engine.sync(WEIGHTS, 0)
    again = ["/is_paused", "/pause", "/start_weight_update", "/finish_weight_update", *UPDATE[2:]]
    assert server.paths[2 : 2 + len(again)] == again
    engine.close()


MISSING = {
    "development mode": (
        "/weight_info",
        404,
        {"detail": "Not Found"},
        "does not run in development mode. Start it with: VLLM_",
    ),
    "backend": (
        "/init_weight_transfer_engine",
        500,
        error("not configured"),
        "has no weight transfer 'rllava_pl'",
    ),
    "tokens": (
        GENERATE,
        403,
        error("Scale-out endpoints are disabled."),
        "disabled. It takes text only, no token ids. Start",
    ),
    "key": (
        "/v1/models",
        401,
        {"error": "Unauthorized"},
        "Unauthorized. Set VLLM_API_KEY to the key the server was started",
    ),
}


@pytest.mark.parametrize(("path", "status", "body", "message"), MISSING.values(), ids=MISSING.keys())
def test_server_without_a_needed_option_is_refused_with_the_command(
    server: FakeVLLM, policy: Policy, path: str, status: int, body: object, message: str
) -> None:
    server.trouble[path] = [(status, body)] * 9
    engine = VLLMServerEngine([server.url], policy)
    with pytest.raises(ServerError, match=f"vLLM server {server.url} answered {status} at .*{message}"):
        engine.sync(WEIGHTS, 0)
    engine.close()


def test_raw_log_probs_are_refused(server: FakeVLLM, policy: Policy) -> None:
    server.raw = True
    engine = VLLMServerEngine([server.url], policy)
    with pytest.raises(
        ServerError, match=r"gives log-probs before temperature and bans.*--logprobs-mode processed_logprobs"
    ):
        engine.sync(WEIGHTS, 0)
    assert engine.version == -1
    engine.close()


def test_server_with_another_model_is_refused(server: FakeVLLM, policy: Policy) -> None:
    engine = VLLMServerEngine([server.url], policy, model="large")
    with pytest.raises(ServerError, match=r"has no model 'large'; it serves \['tiny'\]"):
        engine.sync(WEIGHTS, 0)
    engine.close()


def test_key_is_sent_and_proxies_are_ignored(server: FakeVLLM, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    engine = VLLMServerEngine([server.url], policy, model="tiny")
    engine.sync(WEIGHTS, 0)
    generate(engine, requests(policy, [0]))
    engine.close()
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert server.posted(GENERATE)[-1]["model"] == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("refused", [False, True])
def test_first_of_two_ranks_sends_weights_and_both_wait(
    server: FakeVLLM, tmp_path: Path, tiny_path: Callable[[str], str], refused: bool
) -> None:
    if refused:
        server.trouble["/finish_weight_update"] = [(500, error("no"))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        *launcher,
        str(ROOT / "tests/rollout/sync_on_ranks.py"),
        str(tmp_path),
        tiny_path("idefics3"),
        server.url,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    if refused:
        assert first == f"vLLM server {server.url} answered 500 at the weights of update 2: no"
        assert second == "another rank could not give the servers the weights of update 2"
    else:
        assert first == second == "gathered a.weight on both, sampled with 2"
        assert server.paths.count("/update_weights") == server.paths.count("/init_weight_transfer_engine") == 1
