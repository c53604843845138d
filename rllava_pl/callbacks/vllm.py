"""Rollouts from vLLM, inside the trainer's process or from servers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from rllava_pl.distributed.collectives import rank
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.callbacks import SamplingModule, SyncCheckedRollout
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_adapter import adapter_options
from rllava_pl.rollout.vllm_build import MemoryMode, build_llm, context_of, memory_mode, require_vllm
from rllava_pl.rollout.vllm_http import RequestLimits, base_url, require_client
from rllava_pl.rollout.vllm_server import VLLMServerEngine


class VLLMRollout(SyncCheckedRollout):
    """Rollouts from a vLLM engine in the trainer's process, one a rank; weights are pushed after every update.

    The engine is built at the first rollout. It starts from the policy's checkpoint and gets the trained weights before
    it samples anything. See the guide "Rollout engines" for the memory modes and for what was tried where.

    Args:
        context_tokens: Longest prompt and response together; never more than the model's positions.
        images_per_prompt: Most images of a prompt.
        kv_cache_gib: Size of the cache of keys and values, on the GPU that trains or in host memory.
        memory: What is freed while the policy is updated. "auto": release_kv on a GPU, resident on a CPU. "resident":
            nothing. "release_kv": the cache. "sleep": cache and weights, which are kept in host memory. "discard":
            cache and weights; every wake is followed by a sync and a sync check.
        dtype: Of the engine's weights and arithmetic. "auto": what the trainer computes in.
        eager: No CUDA graphs and no compilation: starts sooner, samples slower. On a CPU always.
        lora: How a policy with LoRA adapters is pushed. "merge": as full weights. "adapter": the base weights once,
            then the adapters alone.
        sync_check_every: Syncs from one comparison of engine and trainer on fixed probes to the next; 0: never.
        sync_check_limit: Largest difference of a log-prob that passes, in nats; 0: 1e-3 in float32, else a mean of
            0.05.
        sync_check_recover: At a larger one, push all weights again and switch to memory mode "sleep" before giving up.
        options: Further arguments of ``vllm.LLM``, e.g. ``{max_num_seqs: 256}``.
    """

    def __init__(
        self,
        context_tokens: int = 4096,
        images_per_prompt: int = 4,
        kv_cache_gib: float = 1.0,
        memory: MemoryMode = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        eager: bool = False,
        lora: Literal["merge", "adapter"] = "merge",
        sync_check_every: int = 50,
        sync_check_limit: float = 0.0,
        sync_check_recover: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib is {kv_cache_gib}; use a positive size, e.g. 1.0")
        if memory == "discard" and not sync_check_every:
            raise ValueError("memory discard leaves garbage wherever a sync misses a tensor; set sync_check_every: 1")
        super().__init__(1 if memory == "discard" else sync_check_every, sync_check_limit, sync_check_recover)
        self.context_tokens = context_tokens
        self.images_per_prompt = images_per_prompt
        self.kv_cache_gib = kv_cache_gib
        self.memory = memory
        self.dtype = dtype
        self.eager = eager
        self.lora = lora
        self.options = dict(options or {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without vLLM, or without the GPU that the memory mode needs, refuse to begin."""
        require_vllm()
        memory_mode(self.memory)
        super().setup(trainer, pl_module, stage)

    def engine_dtype(self, policy: Policy) -> torch.dtype:
        """As the option says."""
        return super().engine_dtype(policy) if self.dtype == "auto" else getattr(torch, self.dtype)

    def build(self, module: SamplingModule) -> VLLMEngine:
        """An engine in this process; all ranks build theirs at the same time."""
        policy, memory, adapter = module.policy, memory_mode(self.memory), self.lora == "adapter"
        options = adapter_options(policy) if adapter else {}
        if not Path(policy.path).is_dir():
            options["revision"] = policy.revision
        options |= {"dtype": str(self.engine_dtype(policy)).removeprefix("torch.")}
        options |= {"seed": (module.seed + rank()) % 2**31}  # of requests without one
        options |= {"enforce_eager": True} if self.eager else {}
        foreign_group = dist.is_initialized()
        llm = build_llm(
            policy.path,
            context_tokens=context_of(policy.path, self.context_tokens),
            images=self.images_per_prompt,
            kv_cache_gib=self.kv_cache_gib,
            memory=memory,
            **(options | self.options),
        )
        if not foreign_group:  # vLLM made one of a single process, which Lightning takes for a distributed run
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        return VLLMEngine(llm, policy, memory=memory, adapter=adapter, foreign_group=foreign_group)


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
