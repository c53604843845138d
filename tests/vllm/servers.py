"""Real vLLM servers on loopback, as processes that tests may stop and kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0
OPTIONS = (
    *("--host", "127.0.0.1", "--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
    *("--generation-config", "vllm", "--weight-transfer-config", '{"backend": "rllava_pl"}'),
)
"""Those of the docs."""
SMALL = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--limit-mm-per-prompt", '{"image": 3, "video": 0}'),
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),  # a seeded request in parts dies on a CPU
)


class RealServer:
    """One server with the processes it starts, on one port that stays the same over restarts."""

    def __init__(
        self, model: str, log: Path, options: Sequence[str] = (*OPTIONS, *SMALL), *, dev_mode: bool = True
    ) -> None:
        self.model, self.options, self.dev_mode, self.log = model, options, dev_mode, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": str(int(self.dev_mode)),
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port), *self.options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group, which signals reach as a whole
            )
        last = time.monotonic() + START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > last:
                self.kill()
                raise RuntimeError(f"the vLLM server did not start:\n{self.log.read_text('utf-8', 'replace')[-3000:]}")
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that answers."""
        return self._process.pid

    def kill(self) -> None:
        """It and all that it started; also what is left when it has died itself."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
