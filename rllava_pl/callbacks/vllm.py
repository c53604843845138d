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
from rllava_pl.rollout.callbacks import SamplingModule, SyncCheckedRollout
from rllava_pl.rollout.vllm import VLLMEngine
from rllava_pl.rollout.vllm_adapter import adapter_options
from rllava_pl.rollout.vllm_build import MemoryMode, build_llm, context_of, memory_mode, require_vllm

EngineDType = Literal["auto", "float32", "bfloat16", "float16"]


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
        dtype: EngineDType = "auto",
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
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ModuleNotFoundError: vLLM is not installed.
            ValueError: The memory mode needs a GPU.
        """
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
        foreign_group = dist.is_initialized()
        llm = build_llm(
            policy.path,
            dtype=str(self.engine_dtype(policy)).removeprefix("torch."),
            context_tokens=context_of(policy.path, self.context_tokens),
            images=self.images_per_prompt,
            kv_cache_gib=self.kv_cache_gib,
            memory=memory,
            eager=self.eager,
            seed=(module.seed + rank()) % 2**31,
            options=options | self.options,
        )
        if not foreign_group:  # vLLM made one of a single process, which Lightning takes for a distributed run
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        return VLLMEngine(llm, policy, memory=memory, adapter=adapter, foreign_group=foreign_group)
