"""A server with the routes of vLLM 0.32 that the client uses, and their answers as the real one gives them."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Json = dict[str, object]
GENERATE = "/inference/v1/generate"


class FakeVLLM(ThreadingHTTPServer):
    """Answers every sample with the tokens 7 and 2, log-probs -0.5 and -1; refuses what the real one refuses.

    ``asked`` has every request in order, signs of life apart. ``trouble[path]`` is what to answer with in place of the
    next requests to a path, as (status, body). With ``hung`` nothing is answered any more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.trouble: dict[str, list[tuple[int, object]]] = defaultdict(list)
        self.label = "default"
        self.paused = self.updating = self.raw = False
        self.context_tokens = 64
        self.hung = threading.Event()
        self.over = threading.Event()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def posted(self, path: str) -> list[Json]:
        return [body for asked, body in self.asked if asked == path]

    def handle_error(self, *args: object) -> None:
        """A client that went away is nothing to report."""

    def answer(self, path: str, body: Json) -> tuple[int, object]:
        if self.trouble[path]:
            return self.trouble[path].pop(0)
        match path:
            case "/pause" | "/resume":
                self.paused = path == "/pause"
                return 200, {"status": "paused" if self.paused else "resumed"}
            case "/start_weight_update":
                if self.updating:
                    return 500, error("start_weight_update called while a weight update is already active.")
                self.updating = True
            case "/update_weights" if not self.updating:
                return 500, error("start_weight_update must be called before update_weights.")
            case "/finish_weight_update":
                self.updating, self.label = False, str(body.get("weight_version", self.label))
        return 200, self.content(path, body)

    def content(self, path: str, body: Json) -> object:
        answers = {
            "/is_paused": {"is_paused": self.paused},
            "/weight_info": {"weight_version": self.label},
            "/v1/models": {"object": "list", "data": [{"id": "tiny", "max_model_len": self.context_tokens}]},
            "/reset_prefix_cache": {"success": True},
            "/reset_encoder_cache": None,
        }
        return self.samples(body) if path == GENERATE else answers.get(path, {"message": "done"})

    def samples(self, body: Json) -> Json:
        sampling = body["sampling_params"]
        forced = [int(i) for i, bias in sampling.get("logit_bias", {}).items() if bias > 0]
        tokens, logp = (forced, [-5.0 if self.raw else 0.0]) if forced else ([7, 2], [-0.5, -1.0])
        content = [
            {"token_id": i, "logprob": x, "rank": 1, "top_logprobs": [{"token_id": i, "logprob": x, "rank": 1}]}
            for i, x in zip(tokens, logp, strict=True)
        ]
        choice = {
            "finish_reason": "length" if forced else "stop",
            "stop_reason": None,
            "token_ids": tokens,
            "weight_versions": [{"version": self.label, "start": 0, "end": len(tokens)}],
            "logprobs": {"content": content},
        }
        choices = [choice | {"index": k} for k in range(sampling.get("n", 1))]
        return {"output_mode": "tokens", "prompt_token_ids": body["token_ids"], "choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, has it answered, writes the answer."""

    server: FakeVLLM

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(content) if content else {}
        if path not in ("/health", "/weight_info"):
            self.server.asked.append((path, body))
            self.server.headers.append(dict(self.headers))
        if self.server.hung.is_set():
            self.server.over.wait()
            return
        status, answer = self.server.answer(path, body)
        text = (
            b"" if answer is None else json.dumps(answer).encode() if not isinstance(answer, str) else answer.encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""


def error(message: str) -> Json:
    return {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}


@contextmanager
def fake_vllm(server: FakeVLLM | None = None) -> Iterator[FakeVLLM]:
    server = server or FakeVLLM()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
