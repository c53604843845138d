"""vLLM inside the trainer's process: continuous batching, and weights that are pushed after every update.

The engine reads prompts as token ids with one placeholder an image and expands them itself; the result must equal the
trainer's ids, which is checked on every row. Log-probs are those after temperature and bans, the distribution that is
trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rllava_pl.models.policy import Policy
from rllava_pl.rollout.common import VLLMBase
from rllava_pl.rollout.vllm_adapter import AdapterFile, base_weights
from rllava_pl.rollout.vllm_build import MemoryMode, in_process, shut_down
from rllava_pl.rollout.vllm_transfer import buckets, to_text
from rllava_pl.types import Generation, Request, Sampling

if TYPE_CHECKING:
    from vllm import LLM


class VLLMEngine(VLLMBase):
    """Samples with a vLLM engine that receives the policy's weights.

    Args:
        llm: The engine; see ``build_llm``.
        policy: The trained one: its tokenizer, its action space.
        memory: What is freed between rollouts; see ``VLLMRollout``.
        adapter: Push the base weights once and after that the LoRA adapter alone, instead of merged weights.
        foreign_group: The process group was not made by the engine, so that closing leaves it.
    """

    context_option = "context_tokens, as far as the model allows"

    def __init__(
        self,
        llm: LLM,
        policy: Policy,
        *,
        memory: MemoryMode = "resident",
        adapter: bool = False,
        foreign_group: bool = False,
    ) -> None:
        super().__init__(policy)
        self.llm = llm
        self.memory = memory
        self.context_tokens = llm.model_config.max_model_len
        vision = llm.model_config.multimodal_config
        self.images = vision.get_limit_per_prompt("image") if vision is not None else 0
        self._foreign_group = foreign_group
        self._adapter = AdapterFile(policy.model) if adapter else None
        self._base_pushed = False
        self._state: Literal["awake", "weights", "asleep"] = "awake"
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Complete every request once a seed; see ``BatchEngine``."""
        from vllm import SamplingParams

        if not requests:
            return []
        self._wake_all()
        prompts = [
            {"prompt_token_ids": self.prompt_ids(request)}
            | ({"multi_modal_data": {"image": list(request.prompt.images)}} if request.prompt.images else {})
            for request in requests
        ]
        with torch.autocast(self.policy.device.type, enabled=False):  # the trainer's is not the engine's
            outputs = self.llm.generate(
                prompts,
                [SamplingParams(**self.parameters(request, sampling)) for request in requests],
                use_tqdm=False,
                lora_request=self._adapter.request() if self._adapter else None,
            )
        generations: list[Generation] = []
        for request, output in zip(requests, outputs, strict=True):
            samples = []
            for x in output.outputs:
                logp = [step[token].logprob for step, token in zip(x.logprobs, x.token_ids, strict=True)]
                samples.append((x.token_ids, logp, x.finish_reason))
            generations += self.generations(request, len(generations), output.prompt_token_ids, samples)
        return generations

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Push all weights, then empty the caches.

        A sync that fails leaves a mixture of two policies; the engine refuses to sample until one is complete.
        """
        self.version = -1
        if self._adapter is None:
            self._push(named_tensors, version)
        else:
            if not self._base_pushed:
                self._push(base_weights(self.policy.model), version)
                self._base_pushed = True
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
            try:  # else the next update could not begin
                self.llm.finish_weight_update("broken")
            except RuntimeError as error:
                if "without a matching start" not in str(error):  # one that broke inside vLLM has ended already
                    raise
            raise
        self.llm.finish_weight_update(str(version))

    def reset_caches(self) -> None:
        """Drop cached prefixes and encoded images, which were computed with the old weights.

        Raises:
            RuntimeError: vLLM refused, because a request is running.
        """
        self.llm.llm_engine.reset_encoder_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def sleep(self) -> None:
        """Free memory, as the memory mode says."""
        if self.memory == "resident" or self._state == "asleep":
            return
        self._wake_all()  # after a sync without a request only the weights are awake
        if self.memory == "release_kv":
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        else:
            self.llm.sleep(level=2 if self.memory == "discard" else 1)
        if self.memory == "discard":
            self.version, self._base_pushed = -1, False
        self._state = "asleep"

    def wake(self) -> None:
        """Weights come first: a sync must find them awake, or waking would restore the old ones."""
        if self._state == "asleep":
            if self.memory != "release_kv":
                self.llm.wake_up(tags=["weights"])
            self._state = "weights"

    def _wake_all(self) -> None:
        """The cache comes last, when the weights are in place."""
        self.wake()
        if self._state == "weights":
            self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_mm_cache()  # both halves of it: sleeping cleared only one
            self._state = "awake"

    def fall_back(self) -> bool:
        """Use memory mode "sleep" from now on; False if the present mode is as safe."""
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
