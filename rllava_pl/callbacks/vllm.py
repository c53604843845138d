"""Rollouts from vLLM inside the trainer's process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from rllava_pl.distributed.collectives import rank
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.callbacks import RolloutCallback, Samples
from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.rollout.sync_check import LIMITS, Canary, Limit
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_adapter import adapter_options
from rllava_pl.rollout.vllm_build import MemoryMode, build_llm, context_of, memory_mode, require_vllm

EngineDType = Literal["auto", "float32", "bfloat16", "float16"]


class VLLMRollout(RolloutCallback):
    """Rollouts from a vLLM engine in the trainer's process, one a rank; weights are pushed after every update.

    The engine is built at the first rollout. It starts from the policy's checkpoint and gets the trained weights before
    it samples anything. See the guide "Rollout engines" for the memory modes and for what was tried where.

    Args:
        context_tokens: Longest prompt and response together; never more than the model's positions.
        images_per_prompt: Most images of a prompt.
        kv_cache_gib: Size of the cache of keys and values, on the GPU that trains or in host memory.
        memory: What is handed back while the policy is updated. "auto": release_kv on a GPU, resident on a CPU.
            "resident": nothing. "release_kv": the cache. "sleep": cache and weights, to host memory. "discard": both,
            for good; every wake is followed by a sync and the canary.
        dtype: Of the engine's weights and arithmetic. "auto": what the trainer computes in.
        eager: No CUDA graphs and no compilation: starts sooner, samples slower. On a CPU always.
        lora: How a policy with LoRA adapters is pushed. "merge": as full weights. "adapter": the base weights once,
            then the adapters alone.
        canary_every: Syncs from one comparison of engine and trainer on fixed probes to the next; 0: never.
        canary_limit: Largest gap of a log-prob that passes, in nats; 0: 1e-3 in float32, else a mean of 0.05.
        canary_recover: At a gap, push all weights again and go on in memory mode "sleep" before giving up.
        options: Further arguments of ``vllm.LLM``, e.g. ``{max_num_seqs: 256}``.
    """

    def __init__(
        self,
        context_tokens: int = 4096,
        images_per_prompt: int = 4,
        kv_cache_gib: float = 1.0,
        memory: MemoryMode = "auto",
        dtype: EngineDType = "auto",
        eager: bool = False,
        lora: Literal["merge", "adapter"] = "merge",
        canary_every: int = 50,
        canary_limit: float = 0.0,
        canary_recover: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib is {kv_cache_gib}; the engine needs some memory for keys and values")
        if canary_every < 0 or canary_limit < 0:
            raise ValueError(f"canary_every ({canary_every}) and canary_limit ({canary_limit}) must not be negative")
        if memory == "discard" and not canary_every:
            raise ValueError("memory discard leaves garbage wherever a sync misses a tensor; keep canary_every above 0")
        self.context_tokens = context_tokens
        self.images_per_prompt = images_per_prompt
        self.kv_cache_gib = kv_cache_gib
        self.memory = memory
        self.dtype = dtype
        self.eager = eager
        self.lora = lora
        self.canary_every = 1 if memory == "discard" else canary_every
        self.canary_limit = canary_limit
        self.canary_recover = canary_recover
        self.options = dict(options or {})
        self._precision = "32-true"
        self._canary: Canary | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ModuleNotFoundError: vLLM is not installed.
            ValueError: The memory mode needs a GPU.
        """
        require_vllm()
        memory_mode(self.memory)
        self._precision = str(trainer.precision)
        super().setup(trainer, pl_module, stage)

    def build(self, module: Samples) -> VLLMEngine:
        """An engine of this process; all ranks build theirs at the same time."""
        policy, path, memory = module.policy, module.source.path, memory_mode(self.memory)
        dtype = self._dtype(policy)
        adapter = self.lora == "adapter"
        options = adapter_options(policy) if adapter else {}
        if not Path(path).is_dir():
            options["revision"] = module.source.revision
        foreign_group = dist.is_initialized()
        llm = build_llm(
            path,
            dtype=str(dtype).removeprefix("torch."),
            context_tokens=context_of(path, self.context_tokens),
            images=self.images_per_prompt,
            kv_cache_gib=self.kv_cache_gib,
            memory=memory,
            eager=self.eager,
            seed=(module.seed + rank()) % 2**31,
            options=options | self.options,
        )
        if not foreign_group:  # vLLM made one, of a single process, and Lightning now speaks of a distributed setting
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        engine = VLLMEngine(llm, policy, memory=memory, adapter=adapter, foreign_group=foreign_group)
        self._canary = self._make_canary(engine, dtype) if self.canary_every else None
        return engine

    def after_sync(self, managed: ManagedEngine) -> None:
        """Compare engine and trainer, if it is time."""
        if self._canary is not None:
            self._canary(managed)

    def _dtype(self, policy: Policy) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        mixed = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}
        return mixed.get(self._precision, policy.dtype)

    def _make_canary(self, engine: VLLMEngine, dtype: torch.dtype) -> Canary:
        limit = Limit(largest=self.canary_limit, mean=self.canary_limit) if self.canary_limit else LIMITS[dtype]
        return Canary(
            engine.policy,
            limit=limit,
            every=self.canary_every,
            context_tokens=engine.context_tokens,
            images=engine.images,
            recover=self.canary_recover,
        )
