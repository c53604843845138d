"""The policy as a user names it: a checkpoint, and what of it is trained."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rllava_pl.models.policy import Policy
from rllava_pl.models.quiet import no_progress_bar
from rllava_pl.models.trainable import LoRA, add_lora, freeze

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedModel

DType = Literal["float32", "bfloat16"]
LoadMode = Literal["full", "lazy", "empty"]
log = logging.getLogger(__name__)


class VLM(Policy):
    """A pretrained vision-language model, as a directory or a hub id; empty until ``load``.

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
        activation_offload: Keep the input of each layer in host memory between forward and backward; needs
            ``gradient_checkpointing``, without which all activations and weights would be copied.

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
        nn.Module.__init__(self)  # not Policy's: the model comes with load()
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze = list(freeze or [])
        self.lora = lora
        self.share_prompt = share_prompt
        self.activation_offload = activation_offload

    def extra_repr(self) -> str:
        """The checkpoint, for ``print``."""
        return self.path

    def prepare(self, seed: int) -> None:
        """Make the checkpoint available; called once a machine, before anything is loaded."""

    def load(self, *, temperature: float = 1.0, trainable: bool = True, mode: LoadMode = "full") -> Self:
        """Load weights and processor into this policy, and return it.

        Args:
            temperature: Of sampling, and so of the log-probs.
            trainable: False freezes all weights and adds no adapters: a reference policy.
            mode: ``full``: every value is read. ``lazy``: values may stay in their file, in its dtype, until the
                policy is sharded (``lazy_weights.py``). ``empty``: parameters have shapes but no values and no memory
                (``meta`` device); buffers are right.
        """
        from rllava_pl.models.processors import load_processor

        model = self.load_model(mode)
        self._attach(model, load_processor(self.path, revision=self.revision), temperature)
        if self.share_prompt and not self.shares_prompt:
            reason = "computing it once per group is not known to be exact for this model"
            log.warning("%s: every prompt is computed once per completion; %s", self.path, reason)
        if not trainable:
            return self.requires_grad_(False).eval()
        freeze(model, self.freeze)
        if self.lora is not None:
            add_lora(model, self.lora)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return self.train(self.gradient_checkpointing)  # it only works in training mode; dropout is off in either

    def load_model(self, mode: LoadMode) -> PreTrainedModel:
        """The transformers model of ``path``; a subclass may build it in another way."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

        from rllava_pl.models.lazy_weights import narrow_dtype, with_lazy_weights

        config = AutoConfig.from_pretrained(self.path, revision=self.revision)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attn_implementation}
        if mode == "empty":
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                model = auto.from_config(config, **options)
            model.tie_weights()  # empty parameters were made one by one
            with suppress(OSError):  # a checkpoint need not have one
                model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.revision)
            return model
        lazy = mode == "lazy" and self.dtype == "float32" and self.lora is None  # adapters take the dtype they find
        if narrow := narrow_dtype(self.path, self.revision) if lazy else None:
            options["dtype"] = narrow
        with no_progress_bar():
            model = auto.from_pretrained(self.path, revision=self.revision, **options)
        return with_lazy_weights(model) if narrow else model


class TinyVLM(VLM):
    """A random-init model of 0.2-0.4 M parameters that has learnt an answer format and nothing else.

    It is built on first use and kept in a cache directory. A short warm-up teaches it to write ``<answer>...</answer>``
    with answers drawn at random, so all that it later learns about images comes from the reward. It shows that every
    part of the loop works together and says nothing about large models.

    Args:
        family: ``idefics3``, ``llava``, ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        questions: All questions of the task; the tokenizer is trained on them.
        answers: All possible answers.
        warmup_steps: Steps of the format warm-up.
        cache_dir: Where built models are kept; by default ``~/.cache/rllava_pl``.
        threads: CPU threads of the process; more hardly speed up steps this small, and slow down on a busy machine.
        gradient_checkpointing: Recompute activations in the backward pass.
        freeze: Globs of parameter names that are not trained, or names of parts, as in ``VLM``.
        lora: Train low-rank adapters only.
        share_prompt: Compute each prompt once a group instead of once a completion.
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
            "", gradient_checkpointing=gradient_checkpointing, freeze=freeze, lora=lora, share_prompt=share_prompt
        )
        self.family = family
        self.questions = questions
        self.answers = answers
        self.warmup_steps = warmup_steps
        self.threads = threads
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir) if cache_dir else caches / "rllava_pl"

    def load(self, *, temperature: float = 1.0, trainable: bool = True, mode: LoadMode = "full") -> Self:
        """As ``VLM.load``; also sets the number of threads."""
        torch.set_num_threads(self.threads)
        return super().load(temperature=temperature, trainable=trainable, mode=mode)

    def prepare(self, seed: int) -> None:
        """Build the model for this seed unless it is in the cache, and point ``path`` at it."""
        from rllava_pl.models import tiny

        questions, answers = tuple(self.questions), tuple(self.answers)
        config = tiny.TinyModelConfig(self.family, questions, answers, seed, self.warmup_steps)
        directory = self.cache_dir / f"{self.family}-{config.key}"
        if not directory.is_dir():
            log.info("building a tiny %s in %s", self.family, directory)
            tiny.build(directory, **asdict(config))
        self.path = str(directory)
