"""Rollouts from vLLM servers, as a callback."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from rllava_pl.rollout.callbacks import SamplingModule, SyncCheckedRollout
from rllava_pl.rollout.vllm_http import RequestLimits, base_url, require_client
from rllava_pl.rollout.vllm_server import VLLMServerEngine


class VLLMServerRollout(SyncCheckedRollout):
    """Rollouts from one or several vLLM servers, which are started beforehand and stay when the run ends.

    The trainer needs no vLLM, only ``rllava-pl[vllm-server]``. The servers get the policy's weights before every
    rollout that follows an update; ``docs/guides/vllm-server.md`` says how to start them and how to guard their port.
    A key, if the servers ask for one, is taken from the environment variable ``VLLM_API_KEY``.

    Args:
        urls: Addresses, ``http://host:port`` each; requests take turns, weights go to all of them.
        model: Name the servers give the model; by default whatever they serve.
        images_per_prompt: Most images of a prompt, as the servers were started for (``--limit-mm-per-prompt``).
        concurrency: Requests, of a whole group each, that one rank has open at a server at a time.
        silence_seconds: A server that fails its health check for so long ends the run. Health is checked every two
            seconds, and a batch of the engine may delay the answer: keep it above the longest of those.
        request_seconds: Longest time for one request, also on a healthy server.
        max_retries: Further attempts at a rollout request that did not get through; weights are never sent twice.
        allow_remote: Also servers at public addresses, whose port everybody can reach unless something guards it.
        sync_check_every: Syncs from one comparison of servers and trainer on fixed probes to the next; 0: never.
        sync_check_limit: Largest difference of a log-prob that passes, in nats; 0: 1e-3 where the trainer computes in
            float32, else a mean of 0.05. Servers in a coarser dtype than the trainer need it set.
    """

    retries = 0  # the client retries single requests

    def __init__(
        self,
        urls: list[str],
        model: str = "",
        images_per_prompt: int = 4,
        concurrency: int = 64,
        silence_seconds: float = 20.0,
        request_seconds: float = 1800.0,
        max_retries: int = 3,
        allow_remote: bool = False,
        sync_check_every: int = 50,
        sync_check_limit: float = 0.0,
    ) -> None:
        super().__init__(sync_check_every, sync_check_limit)
        self.urls = [base_url(url) for url in urls]
        if not urls:
            raise ValueError("urls is empty; name at least one vLLM server, e.g. [http://127.0.0.1:8000]")
        if len(set(self.urls)) < len(urls):
            raise ValueError(f"urls names a server twice: {self.urls}; name each once")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; a server must be given at least 1 request at a time")
        self.model = model
        self.images_per_prompt = images_per_prompt
        self.concurrency = concurrency
        self.limits = RequestLimits(silence_seconds, request_seconds, max_retries)
        self.allow_remote = allow_remote

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to begin without the HTTP client, then as every rollout callback."""
        require_client()
        super().setup(trainer, pl_module, stage)

    def build(self, module: SamplingModule) -> VLLMServerEngine:
        """A client of the servers."""
        return VLLMServerEngine(
            self.urls,
            module.policy,
            model=self.model,
            images=self.images_per_prompt,
            concurrency=self.concurrency,
            limits=self.limits,
            allow_remote=self.allow_remote,
        )
