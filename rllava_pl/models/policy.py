"""The policy π(a | s): a vision-language model behind one forward that returns log-probs.

``forward`` takes P prompts with their N = P·G responses and returns log-probs and entropies of the response tokens
under exactly the distribution the engines sample from: softmax of logits / temperature over the tokens that are not
banned. Where the family allows it, a prompt with its images is computed once for its whole group and without padding
(``shared_prompt``); otherwise once a response (the plain form). Both give the same numbers.

``forward`` has two halves where the family is known: ``hidden`` gives the states that predict the M tokens of the mask,
``read`` their log-probs. A critic reads the same states and lays its values out with ``spread``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rllava_pl.functional.logprobs import chunked_token_log_probs, token_log_probs
from rllava_pl.models import shared_prompt
from rllava_pl.models.dummy_image import dummy_prompt, mask_dummy, prepend_dummy
from rllava_pl.models.encoding import PaddingSide, collate, encode, encode_response, tokenizer_of
from rllava_pl.models.families import banned_token_ids, family_of
from rllava_pl.types import PolicyBatch, PolicyOutput, Prompt, PromptInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rllava_pl.models.encoding import Processor


class Policy(nn.Module):
    """A model with its processor and its action space.

    Args:
        model: Any transformers model with a language-modelling head.
        processor: The model's processor, or the tokenizer of a text-only model.
        temperature: Divides the logits, in sampling and in log-probs alike.
        share_prompt: Compute a prompt once a group where that is exact for the family.
        activation_offload: Keep what the forward saves for the backward in host memory.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        *,
        temperature: float = 1.0,
        share_prompt: bool = True,
        activation_offload: bool = False,
    ) -> None:
        super().__init__()
        self.share_prompt = share_prompt
        self.activation_offload = activation_offload
        self._attach(model, processor, temperature)

    def _attach(self, model: PreTrainedModel, processor: Processor, temperature: float) -> None:
        """Take a model and its processor, and derive from them what sampling and log-probs need."""
        if not temperature > 0:
            raise ValueError(f"the policy's temperature is {temperature}; log-probs need a positive one")
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.model_family = family_of(model)
        self.tokenizer = tokenizer_of(processor)
        self.banned_ids = banned_token_ids(model, self.tokenizer)
        named = getattr(model.generation_config, "eos_token_id", None)
        ends = getattr(self.tokenizer, "eos_token_id", None) if named is None else named
        if ends is None:
            raise ValueError("no eos_token_id in generation_config.json or the tokenizer: no response would ever end")
        self.stop_ids: list[int] = list(ends) if isinstance(ends, list) else [ends]
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]
        self.shares_prompt = self.share_prompt and shared_prompt.enable(model)
        self.needs_dummy_image = False
        """Whether a batch without images gets a dummy one; needed on several ranks, see ``dummy_image.py``."""
        self._dummy_prompt: PromptInputs | None = None
        # Dropout would make the policy differ from the one that sampled before any update: ratios must start at 1.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0

    @property
    def loaded(self) -> bool:
        """Whether the policy holds a model."""
        return "model" in self._modules

    @property
    def dummy_prompt(self) -> PromptInputs:
        """A prompt of one image, or of text alone for a text-only model; made once."""
        if self._dummy_prompt is None:
            self._dummy_prompt = dummy_prompt(self.processor, self.model_family)
        return self._dummy_prompt

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are, and so where inputs go."""
        return self.model.get_input_embeddings().weight.device

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptInputs]:
        """Prompts as this model reads them; see ``encoding.encode``."""
        return encode(self.processor, prompts, self.model_family)

    def encode_response(self, text: str) -> Tensor:
        """Ids (T,) of a demonstration as a response of this policy; see ``encoding.encode_response``."""
        return encode_response(self.tokenizer, text, banned_ids=self.banned_ids, stop_ids=self.stop_ids)

    def decode(self, response_ids: Tensor) -> str:
        """Text of a response without the model's control tokens; for rewards and people."""
        hidden = {*self.stop_ids, self.pad_id}
        return str(self.tokenizer.decode([i for i in response_ids.tolist() if i not in hidden]))

    def collate(self, inputs: Sequence[PromptInputs]) -> dict[str, Tensor]:
        """Model inputs of several prompts, padded on the left, on the model's device and in its dtype."""
        if not self._lacks_image(inputs):
            return self._collate(inputs)
        batch = self._collate(prepend_dummy(inputs, self.dummy_prompt))
        mask_dummy(batch["attention_mask"], len(self.dummy_prompt))
        return batch | {"position_ids": self._positions(batch)}

    def _collate(self, inputs: Sequence[PromptInputs], side: PaddingSide = "left") -> dict[str, Tensor]:
        batch = collate(inputs, pad_id=self.pad_id, axis=self.model_family.image_axis, device=self.device, side=side)
        batch["position_ids"] = self._positions(batch)
        return {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in batch.items()}

    def _lacks_image(self, inputs: Sequence[PromptInputs]) -> bool:
        """Whether a dummy image must be added."""
        return self.needs_dummy_image and not any(x.images for x in inputs)

    def _positions(self, batch: dict[str, Tensor]) -> Tensor:
        """Position ids (P, S), or (3, P, S) for rotary embeddings over time, height and width; pads do not count."""
        rope_index = getattr(self.model.base_model, "get_rope_index", None)
        if rope_index is None:
            return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        positions: Tensor = rope_index(
            batch["input_ids"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch.get("image_grid_thw"),
            attention_mask=batch["attention_mask"],
        )[0]
        return positions

    def forward(self, batch: PolicyBatch, entropy: bool = True) -> PolicyOutput:
        """Log-probs and entropies of the response tokens, (N, T) each, 0 where the mask is False.

        Args:
            batch: P prompts and their N = P·G responses.
            entropy: False skips the entropies, which are then 0 everywhere; log-probs are the same to the bit.
        """
        if self.model_family.causal:
            return self.read(self.hidden(batch), batch, entropy)
        mask_NT, ids_M = self._targets(batch)
        with self._saved_tensors():
            inputs = self._repeat_prompts(batch)
            logits_NTV = self.model(**inputs, use_cache=False, logits_to_keep=mask_NT.shape[1]).logits
        return self._output(self._from_logits(logits_NTV[mask_NT], ids_M, entropy), mask_NT)

    def hidden(self, batch: PolicyBatch) -> Tensor:
        """Final hidden states (M, H) that predict the M tokens whose mask is True, row by row.

        Each depends on its prompt, the images and the response before its token, not on the token: it is the state
        that a critic values.

        Raises:
            ValueError: The family is not known to be causal; what its head reads need not be these states.
        """
        if not self.model_family.causal:
            raise ValueError(
                f"no hidden states for the family {self.model.config.model_type!r}: only its logits are known to be "
                "right; use an algorithm without a critic, or enter the family in models/families.py if it is causal"
            )
        with self._saved_tensors():
            if self.shares_prompt:
                return self._hidden_shared(batch)
            hidden = self.model.base_model(**self._repeat_prompts(batch), use_cache=False).last_hidden_state
            return hidden[:, -batch.mask_NT.shape[1] :][batch.mask_NT.to(self.device)]

    def _saved_tensors(self) -> AbstractContextManager[object]:
        """Keeps what autograd saves in host memory if activations are offloaded."""
        if not self.activation_offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def read(self, hidden_MH: Tensor, batch: PolicyBatch, entropy: bool = True) -> PolicyOutput:
        """Log-probs and entropies from ``hidden(batch)``; no logits are computed at padding."""
        mask_NT, ids_M = self._targets(batch)
        return self._output(self._from_hidden(hidden_MH, ids_M, entropy), mask_NT)

    def _targets(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """The mask (N, T) and the ids (M,) under it, on the policy's device."""
        mask_NT = batch.mask_NT.to(self.device)
        return mask_NT, batch.response_ids_NT.to(self.device)[mask_NT]

    @staticmethod
    def _output(of_tokens: tuple[Tensor, Tensor], mask_NT: Tensor) -> PolicyOutput:
        logp_M, entropy_M = of_tokens
        return PolicyOutput(spread(logp_M, mask_NT), spread(entropy_M, mask_NT))

    def _from_hidden(self, hidden_MH: Tensor, ids_M: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None or hasattr(head, "lora_A"):  # its weight is not all of it
            return self._from_logits(head(hidden_MH), ids_M, entropy)
        logp, entropies = chunked_token_log_probs(
            hidden_MH[None],
            head.weight,
            ids_M[None],
            temperature=self.temperature,
            banned_ids=self.banned_ids,
            entropy=entropy,
        )
        return logp[0], entropies[0]

    def _from_logits(self, logits_MV: Tensor, ids_M: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        logp, entropies = token_log_probs(
            logits_MV[None], ids_M[None], temperature=self.temperature, banned_ids=self.banned_ids, entropy=entropy
        )
        return logp[0], entropies[0]

    def _repeat_prompts(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """N rows of [prompt | response]; the last response token is never an input."""
        inputs = self.collate([x for x in batch.inputs for _ in range(batch.group_size)])
        ids, positions = batch.response_ids_NT[:, :-1].to(self.device), inputs["position_ids"]
        following = next_positions(positions)[:, None] + torch.arange(ids.shape[1], device=self.device)
        following = following.expand(*positions.shape[:-1], -1)
        longer = {
            "input_ids": torch.cat([inputs["input_ids"], ids], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1),
            "position_ids": torch.cat([positions, following], -1),
        }
        further = {name: nn.functional.pad(inputs[name], (0, ids.shape[1])) for name in batch.inputs[0].tokens}
        return inputs | longer | further  # further inputs are 0 at text

    def _hidden_shared(self, batch: PolicyBatch) -> Tensor:
        """The states of ``hidden`` from one row that holds every prompt once and no padding; see ``shared_prompt``."""
        mask_NT = batch.mask_NT.to(self.device)
        prompts = (*batch.inputs, self.dummy_prompt) if self._lacks_image(batch.inputs) else batch.inputs
        unanswered = [0] * (len(prompts) * batch.group_size - len(mask_NT))  # the dummy prompt has no responses
        layout = shared_prompt.Layout.of([len(x) for x in prompts], context_lengths(mask_NT) + unanswered, self.device)
        packed = self._pack(prompts, batch.response_ids_NT.to(self.device), layout)
        hidden: Tensor = self.model.base_model(**packed, shared_prompt=layout, use_cache=False).last_hidden_state
        return hidden[0].index_select(0, layout.predictors(mask_NT))

    def _pack(self, prompts: Sequence[PromptInputs], ids_NT: Tensor, layout: shared_prompt.Layout) -> dict[str, Tensor]:
        """Model inputs of the row: everything that runs along the tokens as (..., 1, L), images in order."""
        rows, steps = layout.response_slots_NR.shape
        ids_NR = nn.functional.pad(ids_NT[:, :steps], (0, 0, 0, rows - len(ids_NT)))
        packed = self._collate(prompts, side="right")
        ends_N = next_positions(packed["position_ids"]).repeat_interleave(rows // len(prompts))
        positions_NR = ends_N[:, None] + torch.arange(steps, device=self.device)  # a response follows its prompt
        responses = {"input_ids": ids_NR, "position_ids": positions_NR}
        for name in ("input_ids", "position_ids", *prompts[0].tokens):
            along = responses.get(name, torch.zeros_like(ids_NR))  # further inputs are 0 at text
            along = along.expand(*packed[name].shape[:-2], -1, -1)
            packed[name] = layout.row(packed[name], along).unsqueeze(-2)
        if self.model_family.image_axis == "prompt":
            images = {name for x in prompts for name in x.images}
            packed |= {name: packed[name].flatten(0, 1)[None] for name in images}  # one prompt of all images
        packed["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # 4-D: never read
        return packed

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Without its LoRA adapters the policy is bit-equal to the loaded weights: the reference of a LoRA run."""
        layers = [m for m in self.model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]
        states = [[p.requires_grad for p in layer.parameters()] for layer in layers]
        for layer in layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        try:
            yield
        finally:
            for layer, flags in zip(layers, states, strict=True):
                layer.enable_adapters(True)  # type: ignore[operator]
                for parameter, flag in zip(layer.parameters(), flags, strict=True):
                    parameter.requires_grad_(flag)


def spread(values_M: Tensor, mask_NT: Tensor) -> Tensor:
    """(M,) values of the tokens whose mask is True, laid out row by row as (N, T); 0 elsewhere. Differentiable.

    >>> spread(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    return values_M.new_zeros(mask_NT.shape).masked_scatter(mask_NT, values_M)


def context_lengths(mask_NT: Tensor) -> list[int]:
    """Tokens of each response that a later token under the mask is predicted from: all before the last such token.

    >>> context_lengths(torch.tensor([[True, False, True, False], [True, False, False, False], [False] * 4]))
    [2, 0, 0]
    """
    steps = torch.arange(mask_NT.shape[1], device=mask_NT.device)
    lengths: list[int] = (mask_NT * steps).amax(1).tolist()
    return lengths


def next_positions(position_ids: Tensor) -> Tensor:
    """(P,): position behind each prompt, the largest of its row plus one; padding on the left does not shift it."""
    highest = position_ids.amax(0) if position_ids.ndim == 3 else position_ids
    return highest.amax(-1) + 1
