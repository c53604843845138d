"""Rollouts from vLLM servers, as a callback."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from rllava_pl.rollout.callbacks import RolloutCallback, Samples
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.sync_check import LIMITS, Canary, Limit
from rllava_pl.rollout.vllm_http import Limits, base_url, require_client
from rllava_pl.rollout.vllm_server import VLLMServerEngine
from rllava_pl.types import RolloutEngine


class VLLMServerRollout(RolloutCallback):
    """Rollouts from one or several vLLM servers, which are started beforehand and stay when the run ends.

    The trainer needs no vLLM, only ``rllava-pl[vllm-server]``. The servers get the policy's weights before every
    rollout that follows an update; ``docs/guides/vllm-server.md`` says how to start them and how to guard their port.
    A key, if the servers ask for one, is taken from the environment variable ``VLLM_API_KEY``.

    Args:
        urls: Addresses, ``http://host:port`` each; requests go round, weights go to all of them.
        model: Name the servers give the model; by default whatever they serve.
        images_per_prompt: Most images of a prompt, as the servers were started for (``--limit-mm-per-prompt``).
        concurrency: Requests, of a whole group each, that a server is given at a time by one rank.
        silence_seconds: A server that gives no sign of life for so long ends the run. Signs are asked for every two
            seconds, and a batch of the engine may come before the answer: keep it above the longest of those.
        request_seconds: Longest time for one request, also on a server that is alive.
        max_retries: Further attempts at a rollout request that did not get through; weights are never sent twice.
        allow_remote: Also servers at public addresses, whose port everybody can reach unless something guards it.
        canary_every: Syncs from one comparison of servers and trainer on fixed probes to the next; 0: never.
        canary_limit: Largest gap of a log-prob that passes, in nats; 0: 1e-3 where the trainer computes in float32,
            else a mean of 0.05. Servers in a coarser dtype than the trainer need it set.
    """

    retries = 0  # the client makes its own, request by request

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
        canary_every: int = 50,
        canary_limit: float = 0.0,
    ) -> None:
        self.urls = [base_url(url) for url in urls]
        if not urls:
            raise ValueError("urls is empty; name at least one vLLM server, e.g. [http://127.0.0.1:8000]")
        if len(set(self.urls)) < len(urls):
            raise ValueError(f"urls names a server twice: {self.urls}; its weights would be sent twice at once")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; a server must be given at least 1 request at a time")
        if canary_every < 0 or canary_limit < 0:
            raise ValueError(f"canary_every ({canary_every}) and canary_limit ({canary_limit}) must not be negative")
        self.model = model
        self.images_per_prompt = images_per_prompt
        self.concurrency = concurrency
        self.limits = Limits(silence_seconds, request_seconds, max_retries)
        self.allow_remote = allow_remote
        self.canary_every = canary_every
        self.canary_limit = canary_limit
        self._precision = "32-true"
        self._canary: Canary | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to begin without the HTTP client, then as every rollout callback."""
        require_client()
        self._precision = str(trainer.precision)
        self._canary = None
        super().setup(trainer, pl_module, stage)

    def build(self, module: Samples) -> VLLMServerEngine:
        """An engine that talks to the servers."""
        return VLLMServerEngine(
            self.urls,
            module.policy,
            model=self.model,
            images=self.images_per_prompt,
            concurrency=self.concurrency,
            limits=self.limits,
            allow_remote=self.allow_remote,
        )

    def after_sync(self, managed: ManagedEngine) -> None:
        """Compare servers and trainer, if it is time."""
        if self.canary_every:
            self._canary = self._canary or self._make_canary(managed.engine)
            self._canary(managed)

    def _make_canary(self, engine: RolloutEngine) -> Canary:
        """Not before the first sync: only then is it known how long a prompt the servers take."""
        assert isinstance(engine, VLLMServerEngine)
        fine = self._precision == "32-true" and engine.policy.dtype == torch.float32
        limit = LIMITS[torch.float32 if fine else torch.bfloat16]
        if self.canary_limit:
            limit = Limit(largest=self.canary_limit, mean=self.canary_limit)
        return Canary(
            engine.policy,
            limit=limit,
            every=self.canary_every,
            context_tokens=engine.context_tokens,
            images=engine.images,
        )
