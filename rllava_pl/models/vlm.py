"""Where a policy comes from: a checkpoint and what is trained of it."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rllava_pl.models.quiet import no_progress_bar
from rllava_pl.models.trainable import LoRA, add_lora, freeze

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

    from rllava_pl.models.encoding import Processor
    from rllava_pl.models.policy import Policy

DType = Literal["float32", "bfloat16"]
log = logging.getLogger(__name__)


class VLM:
    """A pretrained vision-language model, as a directory or a hub id.

    Args:
        path: Directory in Hugging Face format, or a hub id. Any model that ``AutoModelForImageTextToText`` loads;
            text-only language models work too.
        revision: Branch, tag or commit of a hub id.
        dtype: Of the weights.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``. The shared-prompt form needs ``sdpa``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        freeze: Globs of parameter names that are not trained, or ``vision_tower``, ``connector``, ``language_model``,
            ``embeddings``.
        lora: Train low-rank adapters only; the base model then serves as the reference policy at no cost.
        share_prompt: Compute each prompt once a group instead of once a completion, where that is exact for the family.
        activation_offload: Between forward and backward the input of each layer waits in host memory; needs
            ``gradient_checkpointing``, without which far more would have to travel, the weights included.

    Raises:
        ValueError: ``activation_offload`` without ``gradient_checkpointing``.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str = "main",
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        freeze: list[str] | None = None,
        lora: LoRA | None = None,
        share_prompt: bool = True,
        activation_offload: bool = False,
    ) -> None:
        if activation_offload and not gradient_checkpointing:
            raise ValueError(
                "activation_offload moves inputs of checkpointed layers to the host: set gradient_checkpointing, too"
            )
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze = list(freeze or [])
        self.lora = lora
        self.share_prompt = share_prompt
        self.activation_offload = activation_offload

    def prepare(self, seed: int) -> None:
        """Make the checkpoint available; called once a machine, before anything is loaded."""

    def load(
        self, *, temperature: float = 1.0, trainable: bool = True, empty: bool = False, may_wait: bool = False
    ) -> Policy:
        """Load weights and processor.

        Args:
            temperature: Of sampling, and so of the log-probs.
            trainable: False gives a frozen copy without adapters: a reference policy.
            empty: Parameters have shapes but no values and no memory (``meta``); buffers are right.
            may_wait: Values may be left in their file, in its dtype, until the policy is cut (``models/stored.py``).
        """
        from rllava_pl.models.policy import Policy

        policy = Policy(
            self._empty_model() if empty else self._load_model(may_wait),
            self.load_processor(),
            temperature=temperature,
            share_prompt=self.share_prompt,
            activation_offload=self.activation_offload,
        )
        if self.share_prompt and not policy.shares_prompt:
            log.warning("%s: each prompt is computed once a completion; sharing is not known to be exact", self.path)
        if not trainable:
            return policy.requires_grad_(False).eval()
        self._make_trainable(policy.model)
        return policy.train(self.gradient_checkpointing)  # it only works in training mode; dropout is off in either

    def load_processor(self) -> Processor:
        """The processor, or the tokenizer of a text-only model."""
        from rllava_pl.models.processors import load_processor

        return load_processor(self.path, revision=self.revision)

    def _load_model(self, may_wait: bool) -> PreTrainedModel:
        from rllava_pl.models.lazy_weights import let_wait, narrow_dtype

        _, auto, options = self._architecture()
        can_wait = may_wait and self.dtype == "float32" and self.lora is None  # adapters take the dtype they find
        stored = narrow_dtype(self.path, self.revision) if can_wait else None
        with no_progress_bar():
            model = auto.from_pretrained(
                self.path, revision=self.revision, **options | ({"dtype": stored} if stored else {})
            )
        return let_wait(model) if stored else model

    def _empty_model(self) -> PreTrainedModel:
        from accelerate import init_empty_weights
        from transformers import GenerationConfig

        config, auto, options = self._architecture()
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, **options)
        model.tie_weights()  # empty parameters were made one by one
        with suppress(OSError):  # a checkpoint need not have one
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.revision)
        return model

    def _architecture(self) -> tuple[PretrainedConfig, type[AutoModelForCausalLM], dict[str, object]]:
        """Config, the class that builds models of it, and how."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(self.path, revision=self.revision)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        return config, auto, {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attn_implementation}

    def _make_trainable(self, model: PreTrainedModel) -> None:
        freeze(model, self.freeze)
        if self.lora is not None:
            add_lora(model, self.lora)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class TinyVLM(VLM):
    """A random-init model of 0.2-0.4 M parameters that has learnt an answer format and nothing else.

    It is built on first use and kept in a cache directory. A short warm-up teaches it to write ``<answer>...</answer>``
    with answers drawn at random, so whatever it later knows about pictures comes from the reward. It proves that every
    part of the loop is wired rightly and says nothing about large models.

    Args:
        family: ``idefics3``, ``llava``, ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        questions: What will be asked; the tokenizer is trained on it.
        answers: The possible answers.
        warmup_steps: Steps of the format warm-up.
        cache_dir: Where built models are kept; by default ``~/.cache/rllava_pl``.
        threads: CPU threads of the process; more hardly speed up steps this small, and hurt on a busy machine.
        gradient_checkpointing: As in ``VLM``.
        freeze: As in ``VLM``.
        lora: As in ``VLM``.
        share_prompt: As in ``VLM``.
    """

    def __init__(
        self,
        family: str = "idefics3",
        *,
        questions: list[str],
        answers: list[str],
        warmup_steps: int = 40,
        cache_dir: str = "",
        threads: int = 1,
        gradient_checkpointing: bool = False,
        freeze: list[str] | None = None,
        lora: LoRA | None = None,
        share_prompt: bool = True,
    ) -> None:
        super().__init__(
            path="",
            gradient_checkpointing=gradient_checkpointing,
            freeze=freeze,
            lora=lora,
            share_prompt=share_prompt,
        )
        self.family = family
        self.questions = questions
        self.answers = answers
        self.warmup_steps = warmup_steps
        self.threads = threads
        self.cache_dir = Path(cache_dir) if cache_dir else _cache_home() / "rllava_pl"

    def load(
        self, *, temperature: float = 1.0, trainable: bool = True, empty: bool = False, may_wait: bool = False
    ) -> Policy:
        """As ``VLM.load``; also sets the number of threads."""
        import torch

        torch.set_num_threads(self.threads)
        return super().load(temperature=temperature, trainable=trainable, empty=empty, may_wait=may_wait)

    def prepare(self, seed: int) -> None:
        """Build the model of this recipe and seed unless it is in the cache, and point ``path`` at it."""
        from rllava_pl.models import tiny

        key = tiny.recipe_key(self.family, self.questions, self.answers, seed, self.warmup_steps)
        directory = self.cache_dir / f"{self.family}-{key}"
        if not directory.is_dir():
            log.info("building a tiny %s in %s", self.family, directory)
            tiny.build(
                directory,
                family=self.family,
                questions=self.questions,
                answers=self.answers,
                seed=seed,
                warmup_steps=self.warmup_steps,
            )
        self.path = str(directory)


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
