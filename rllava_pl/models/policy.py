"""The policy π(a | s): a vision-language model behind one forward that returns log-probs.

``forward`` takes P prompts with their N = P·G responses and returns log-probs and entropies of the response tokens
under exactly the distribution the engines sample from: softmax of logits / temperature over the tokens that are not
banned. Where the family allows it a prompt, its images included, is computed once for its whole group, and no padding
at all (``shared_prompt``), else once a response (the plain form); both give the same numbers.

``forward`` is two halves where the family is known: ``hidden`` gives the states that predict the M tokens of the mask,
``read`` their log-probs. A critic reads the same states and lays its values out with ``spread``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rllava_pl.functional.logprobs import chunked_token_log_probs, token_log_probs
from rllava_pl.models import shared_prompt
from rllava_pl.models.dummy_image import blank_prompt, hide, with_blank
from rllava_pl.models.encoding import PaddingSide, collate, encode, encode_response, tokenizer_of
from rllava_pl.models.families import banned_token_ids, family_of
from rllava_pl.types import PolicyBatch, PolicyOutput, Prompt, PromptInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rllava_pl.models.encoding import Processor


class Policy(nn.Module):
    """A loaded model with its processor and its action space.

    Args:
        model: Any transformers model with a language-modelling head.
        processor: The model's processor, or the tokenizer of a text-only model.
        temperature: Divides the logits, in sampling and in log-probs alike.
        share_prompt: Compute a prompt once a group where that is exact for the family.
        activation_offload: What the forward keeps for the backward waits in host memory.
    """

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
        if not temperature > 0:
            raise ValueError(f"the policy's temperature is {temperature}; log-probs need a positive one")
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.activation_offload = activation_offload
        self.family = family_of(model)
        self.tokenizer = tokenizer_of(processor)
        self.banned_ids = banned_token_ids(model, self.tokenizer)
        self.stop_ids = _stop_ids(model, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]
        self.shares_prompt = share_prompt and shared_prompt.enable(model)
        self.always_sees = False
        """Whether a batch without images is shown a blank one; needed on several ranks, see ``blank.py``."""
        _turn_off_dropout(model)

    @cached_property
    def blank(self) -> PromptInputs:
        """A prompt about nothing, with an image where the model has eyes."""
        return blank_prompt(self.processor, self.family)

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are, and so where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptInputs]:
        """Prompts as this model reads them; see ``encoding.encode``."""
        return encode(self.processor, prompts, self.family)

    def encode_response(self, text: str) -> Tensor:
        """Ids (T,) of a demonstration as a response of this policy; see ``encoding.encode_response``."""
        return encode_response(self.tokenizer, text, banned_ids=self.banned_ids, stop_ids=self.stop_ids)

    def decode(self, response_ids: Tensor) -> str:
        """Text of a response without the model's control tokens; for rewards and people."""
        hidden = {*self.stop_ids, self.pad_id}
        return str(self.tokenizer.decode([i for i in response_ids.tolist() if i not in hidden]))

    def collate(self, inputs: Sequence[PromptInputs]) -> dict[str, Tensor]:
        """Model inputs of several prompts, padded on the left, on the policy's device and in its dtype."""
        if not self._blind(inputs):
            return self._collate(inputs)
        batch = self._collate(with_blank(inputs, self.blank))
        hide(batch["attention_mask"], len(self.blank))
        return batch | {"position_ids": self._positions(batch)}

    def _collate(self, inputs: Sequence[PromptInputs], side: PaddingSide = "left") -> dict[str, Tensor]:
        batch = collate(inputs, pad_id=self.pad_id, axis=self.family.image_axis, device=self.device, side=side)
        batch["position_ids"] = self._positions(batch)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}

    def _blind(self, inputs: Sequence[PromptInputs]) -> bool:
        """Whether a blank image has to be shown."""
        return self.always_sees and not any(x.images for x in inputs)

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

    def forward(self, batch: PolicyBatch) -> PolicyOutput:
        """Log-probs and entropies of the response tokens, (N, T) each, 0 where the mask is False."""
        if self.family.causal:
            return self.read(self.hidden(batch), batch)
        mask_NT, ids_M = self._targets(batch)
        with self._keeping():
            inputs = self._repeat_prompts(batch)
            logits_NTV = self.model(**inputs, use_cache=False, logits_to_keep=mask_NT.shape[1]).logits
        return self._output(self._from_logits(logits_NTV[mask_NT], ids_M), mask_NT)

    def hidden(self, batch: PolicyBatch) -> Tensor:
        """Final hidden states (M, H) that predict the M tokens whose mask is True, row by row.

        Each knows its prompt with the images and the response before its token, not the token: the state a critic
        values.

        Raises:
            ValueError: The family is not known to be causal; what its head reads need not be these states.
        """
        if not self.family.causal:
            raise ValueError(
                f"no hidden states for the family {self.model.config.model_type!r}: only its logits are known to be "
                "right; use an algorithm without a critic, or enter the family in models/families.py if it is causal"
            )
        with self._keeping():
            return self._hidden_shared(batch) if self.shares_prompt else self._hidden_plain(batch)

    def _keeping(self) -> AbstractContextManager[object]:
        """Where autograd keeps what it saves."""
        if not self.activation_offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def read(self, hidden_MH: Tensor, batch: PolicyBatch) -> PolicyOutput:
        """Log-probs and entropies from ``hidden(batch)``; padding never meets the vocabulary."""
        mask_NT, ids_M = self._targets(batch)
        return self._output(self._from_hidden(hidden_MH, ids_M), mask_NT)

    def _targets(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """The mask (N, T) and the ids (M,) under it, on the policy's device."""
        mask_NT = batch.mask_NT.to(self.device)
        return mask_NT, batch.response_ids_NT.to(self.device)[mask_NT]

    @staticmethod
    def _output(of_tokens: tuple[Tensor, Tensor], mask_NT: Tensor) -> PolicyOutput:
        logp_M, entropy_M = of_tokens
        return PolicyOutput(spread(logp_M, mask_NT), spread(entropy_M, mask_NT))

    def _from_hidden(self, hidden_MH: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None or hasattr(head, "lora_A"):  # its weight is not all of it
            return self._from_logits(head(hidden_MH), ids_M)
        logp, entropy = chunked_token_log_probs(
            hidden_MH[None], head.weight, ids_M[None], temperature=self.temperature, banned_ids=self.banned_ids
        )
        return logp[0], entropy[0]

    def _from_logits(self, logits_MV: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = token_log_probs(
            logits_MV[None], ids_M[None], temperature=self.temperature, banned_ids=self.banned_ids
        )
        return logp[0], entropy[0]

    def _hidden_plain(self, batch: PolicyBatch) -> Tensor:
        """(M, H): the states that predict the tokens under the mask, the prompt computed once a response."""
        hidden: Tensor = self.model.base_model(**self._repeat_prompts(batch), use_cache=False).last_hidden_state
        return hidden[:, -batch.mask_NT.shape[1] :][batch.mask_NT.to(self.device)]

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
        """The same states from one row that holds every prompt once and no padding; see ``shared_prompt``."""
        mask_NT = batch.mask_NT.to(self.device)
        prompts = (*batch.inputs, self.blank) if self._blind(batch.inputs) else batch.inputs
        unanswered = [0] * (len(prompts) * batch.group_size - len(mask_NT))  # no response stands behind the blank
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
        positions_NR = ends_N[:, None] + torch.arange(steps, device=self.device)  # a response goes on behind its prompt
        responses = {"input_ids": ids_NR, "position_ids": positions_NR}
        for name in ("input_ids", "position_ids", *prompts[0].tokens):
            along = responses.get(name, torch.zeros_like(ids_NR))  # further inputs are 0 at text
            along = along.expand(*packed[name].shape[:-2], -1, -1)
            packed[name] = layout.row(packed[name], along).unsqueeze(-2)
        if self.family.image_axis == "prompt":
            images = {name for x in prompts for name in x.images}
            packed |= {name: packed[name].flatten(0, 1)[None] for name in images}  # one prompt of all images
        packed["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # 4-D: never read
        return packed

    @cached_property
    def _adapted_layers(self) -> list[nn.Module]:
        """Layers with LoRA adapters; the list is taken at the first use, when the model is complete."""
        return [m for m in self.model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Without its LoRA adapters the policy is bit-equal to the loaded weights: the reference of a LoRA run."""
        states = [[p.requires_grad for p in layer.parameters()] for layer in self._adapted_layers]
        for layer in self._adapted_layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        try:
            yield
        finally:
            for layer, flags in zip(self._adapted_layers, states, strict=True):
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


def _stop_ids(model: PreTrainedModel, tokenizer: object) -> list[int]:
    """End tokens of the model's generation config, or the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = getattr(tokenizer, "eos_token_id", None) if named is None else named
    if named is None:
        raise ValueError("no eos_token_id in generation_config.json or the tokenizer: no response could ever end")
    return list(named) if isinstance(named, list) else [named]


def _turn_off_dropout(model: PreTrainedModel) -> None:
    """Dropout would make the new policy differ from the one that sampled before any update: ratios must start at 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
