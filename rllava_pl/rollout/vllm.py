"""vLLM inside the trainer's process: continuous batching, and weights that are pushed after every update.

The engine reads prompts as token ids with one placeholder an image and expands them itself; what it arrives at must
equal the trainer's ids, which ``check_rollouts`` verifies on every row. Log-probs are those after temperature and bans,
the distribution that is trained. Sampling parameters are always explicit: a model's ``generation_config.json`` would
bring a top-k or a repetition penalty of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rllava_pl.models.encoding import unexpanded_ids
from rllava_pl.models.policy import Policy
from rllava_pl.rollout.vllm_adapter import AdapterFile, base_weights
from rllava_pl.rollout.vllm_build import MemoryMode, in_process, shut_down
from rllava_pl.rollout.vllm_transfer import buckets, to_text
from rllava_pl.types import Request, Rollout, Sampling, Turn

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

BAN = -100.0
"""Logit bias of tokens that are never sampled; vLLM allows no lower one, and e^-100 never happens."""


class VLLMEngine:
    """Rollouts from a vLLM engine that receives the policy's weights.

    Args:
        llm: The engine; see ``build_llm``.
        policy: The one that is trained: its tokenizer, its action space.
        memory: What is handed back between rollouts. "resident": nothing; "release_kv": the cache of keys and values;
            "sleep": also the weights, to host memory; "discard": also the weights, for good, so that every wake is
            followed by a full sync.
        adapter: Push the base weights once and after that the LoRA adapter alone, instead of merged weights.
        foreign_group: The process group was not made by the engine, so that closing leaves it.
    """

    def __init__(
        self,
        llm: LLM,
        policy: Policy,
        *,
        memory: MemoryMode = "resident",
        adapter: bool = False,
        foreign_group: bool = False,
    ) -> None:
        self.llm = llm
        self.policy = policy
        self.memory = memory
        self.version = -1
        self.context_tokens: int = llm.model_config.max_model_len
        vision = llm.model_config.multimodal_config
        self.images: int = vision.get_limit_per_prompt("image") if vision is not None else 0
        self._foreign_group = foreign_group
        self._adapter = AdapterFile(policy.model) if adapter else None
        self._base_pushed = False
        self._state: Literal["awake", "weights", "asleep"] = "awake"
        self.llm.init_weight_transfer_engine({"init_info": {}})

    @property
    def exact(self) -> bool:
        """False: other kernels, other rounding."""
        return False

    # -- sampling ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Complete every request once a seed; see ``RolloutEngine``.

        Sample k of a request draws with its first seed + k, as vLLM numbers the samples of a group.

        Raises:
            RuntimeError: There was no sync yet, or the last one failed.
            ValueError: A request does not fit the engine; names the prompt.
        """
        if not requests:
            return []
        if self.version < 0:
            raise RuntimeError("the engine's weights are not the policy's: there was no complete sync since it started")
        for request in requests:
            check_request(request, sampling, self.policy, context_tokens=self.context_tokens, images=self.images)
        self._wake_all()
        with torch.autocast(self.policy.device.type, enabled=False):  # the trainer's is not the engine's
            outputs = self.llm.generate(
                [self._prompt(request) for request in requests],
                [self._parameters(request, sampling) for request in requests],
                use_tqdm=False,
                lora_request=self._adapter.request() if self._adapter else None,
            )
        return [
            self._rollout(request, output, k)
            for request, output in zip(requests, outputs, strict=True)
            for k in range(len(request.seeds))
        ]

    def _prompt(self, request: Request) -> dict[str, object]:
        images = list(request.prompt.images)
        ids = unexpanded_ids(self.policy.processor, request.prompt) if images else request.inputs.input_ids_S.tolist()
        prompt: dict[str, object] = {"prompt_token_ids": [*ids, *request.prefix_ids]}
        return prompt | ({"multi_modal_data": {"image": images}} if images else {})

    def _parameters(self, request: Request, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            n=len(request.seeds) if sampling.temperature else 1,  # the most likely answer is the same for every seed
            seed=request.seeds[0] % 2**62,
            max_tokens=sampling.max_tokens,
            min_tokens=0,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logprobs=0,  # of the sampled token alone
            logit_bias={i: BAN for i in self.policy.banned_ids},
            ignore_eos=True,  # the policy's own end tokens are all there are
            stop_token_ids=list(self.policy.stop_ids),
            detokenize=False,
        )

    def _rollout(self, request: Request, output: RequestOutput, k: int) -> Rollout:
        completion, given = output.outputs[k % len(output.outputs)], len(request.prefix_ids)
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

    # -- weights -----------------------------------------------------------------------------------------------------

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Push all weights, then forget everything that was computed with the old ones.

        A sync that fails leaves a mixture of two policies; the engine refuses to sample until one is complete.
        """
        self.version = -1
        if self._adapter is None:
            self._push(named_tensors, version)
        elif not self._base_pushed:
            self._push(base_weights(self.policy.model), version)
            self._base_pushed = True
        if self._adapter is not None:
            self.llm.llm_engine.add_lora(self._adapter.write())
        self.reset_caches()
        self.version = version

    def _push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        shared = in_process(self.llm)
        self.llm.start_weight_update()
        try:
            for bucket in buckets(named_tensors):
                self.llm.update_weights({"update_info": {"weights": bucket if shared else to_text(bucket)}})
        except BaseException:
            self._end_broken_update()
            raise
        self.llm.finish_weight_update(str(version))

    def _end_broken_update(self) -> None:
        """Without it the next update could not begin; one that broke inside vLLM has ended already, with an error."""
        try:
            self.llm.finish_weight_update("broken")
        except RuntimeError as error:
            if "without a matching start" not in str(error):
                raise

    def reset_caches(self) -> None:
        """Drop cached prefixes and encoded images, which would silently be those of the old weights.

        Raises:
            RuntimeError: vLLM refused, because a request is running.
        """
        self.llm.llm_engine.reset_encoder_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Hand back memory, as the memory mode says."""
        if self.memory == "resident" or self._state == "asleep":
            return
        self._wake_all()  # a sync without a request has woken the weights alone
        if self.memory == "release_kv":
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        else:
            self.llm.sleep(level=2 if self.memory == "discard" else 1)
        if self.memory == "discard":
            self.version, self._base_pushed = -1, False
        self._state = "asleep"

    def wake(self) -> None:
        """Weights first: a sync must find them awake, or waking would bring back the old ones."""
        if self._state == "asleep":
            if self.memory != "release_kv":
                self.llm.wake_up(tags=["weights"])
            self._state = "weights"

    def _wake_all(self) -> None:
        """The cache comes last, when the weights are in place."""
        self.wake()
        if self._state == "weights":
            self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_mm_cache()  # both halves of it: sleeping has cleared one
            self._state = "awake"

    def fall_back(self) -> bool:
        """Go on in the safest memory mode that hands anything back, "sleep"; False if there is nothing safer."""
        if self.memory not in ("release_kv", "discard"):
            return False
        self.memory = "sleep"
        return True

    def close(self) -> None:
        """Free everything; idempotent."""
        if self.llm is not None:
            shut_down(self.llm, foreign_group=self._foreign_group)
            self.llm = None
        if self._adapter is not None:
            self._adapter.close()


def check_request(request: Request, sampling: Sampling, policy: Policy, *, context_tokens: int, images: int) -> None:
    """Refuse what an engine would refuse or silently change.

    Raises:
        ValueError: Naming the prompt: too long with its response, too many images, or given tokens that are none of
            text.
    """
    uid, prompt, given = request.prompt.uid, len(request.inputs), len(request.prefix_ids)
    needed = prompt + given + sampling.max_tokens
    if needed > context_tokens:
        raise ValueError(
            f"prompt {uid!r}: {prompt} prompt tokens + {given} given + max_tokens {sampling.max_tokens} = {needed}, "
            f"but the engine's context has {context_tokens}; raise context_tokens, as far as the model allows, or "
            "lower sampling.max_tokens"
        )
    if len(request.prompt.images) > images:
        raise ValueError(
            f"prompt {uid!r} shows {len(request.prompt.images)} images, but the engine takes {images} a prompt; raise "
            "images_per_prompt"
        )
    if misplaced := {*policy.banned_ids, *policy.stop_ids}.intersection(request.prefix_ids):
        tokens = policy.tokenizer.convert_ids_to_tokens(sorted(misplaced))
        raise ValueError(
            f"prefix_ids of prompt {uid!r} hold {tokens}; a response goes on behind text only, not behind an end token "
            "or a token that stands for image content"
        )


def _reason(name: str | None) -> Literal["stop", "length", "abort"]:
    return "stop" if name == "stop" else "length" if name == "length" else "abort"
