"""The policy π(a | s): a vision-language model behind one forward that returns log-probs.

``forward`` takes P prompts with their N = P·G responses and returns log-probs and entropies of the response tokens
under exactly the distribution the engines sample from: softmax of logits / temperature over the tokens that are not
banned. A prompt, its images included, is computed once for its whole group where the family allows it
(``shared_prompt``), else once a response (the plain form); both give the same numbers.

``forward`` is two halves where the family is known: ``hidden`` gives the states that predict the M tokens of the mask,
``read`` their log-probs. A critic reads the same states and lays its values out with ``spread``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rllava_pl.functional.logprobs import chunked_token_log_probs, token_log_probs
from rllava_pl.models import shared_prompt
from rllava_pl.models.blank import blank_prompt, hide, with_blank
from rllava_pl.models.encoding import collate, encode, encode_response, tokenizer_of
from rllava_pl.models.families import banned_token_ids, family_of
from rllava_pl.types import PolicyBatch, PolicyOutput, Prompt, PromptInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rllava_pl.models.encoding import Processor

LOGITS_LIMIT = 1 << 24
"""Above this many logits (64 MiB in fp32) log-probs are taken from hidden states in slices; below, in one go."""


class Policy(nn.Module):
    """A loaded model with its processor and its action space.

    Args:
        model: Any transformers model with a language-modelling head.
        processor: The model's processor, or the tokenizer of a text-only model.
        temperature: Divides the logits, in sampling and in log-probs alike.
        share_prompt: Compute a prompt once a group where that is exact for the family.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Processor, *, temperature: float = 1.0, share_prompt: bool = True
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"the policy's temperature is {temperature}; log-probs need a positive one")
        self.model = model
        self.processor = processor
        self.temperature = temperature
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
        """Padded model inputs of several prompts with their position ids, on the policy's device and in its dtype."""
        blind = self.always_sees and not any(x.images for x in inputs)
        shown = with_blank(inputs, self.blank) if blind else inputs
        batch = collate(shown, pad_id=self.pad_id, axis=self.family.image_axis, device=self.device)
        if blind:
            hide(batch["attention_mask"], len(self.blank))
        batch["position_ids"] = self._positions(batch)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}

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
        logits_NTV = self.model(**self._repeat_prompts(batch), use_cache=False, logits_to_keep=mask_NT.shape[1]).logits
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
        hidden_NTH = self._hidden_shared(batch) if self.shares_prompt else self._hidden_plain(batch)
        return hidden_NTH[batch.mask_NT.to(self.device)]

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
        by_weight = getattr(head, "bias", None) is None and not hasattr(head, "lora_A")  # its weight is all of it
        if not by_weight or ids_M.numel() * head.weight.shape[0] <= LOGITS_LIMIT:
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
        """(N, T, H): the states that predict each response token, the prompt computed once a response."""
        hidden: Tensor = self.model.base_model(**self._repeat_prompts(batch), use_cache=False).last_hidden_state
        return hidden[:, -batch.response_ids_NT.shape[1] :]

    def _repeat_prompts(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """N rows of [prompt | response]; the last response token is never an input."""
        inputs = self.collate([x for x in batch.inputs for _ in range(batch.group_size)])
        ids = batch.response_ids_NT[:, :-1].to(self.device)
        packed = self._append(inputs, ids, torch.arange(ids.shape[1], device=self.device))
        packed["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        return packed

    def _hidden_shared(self, batch: PolicyBatch) -> Tensor:
        """The same states with each prompt computed once: P rows of [prompt | response 1 | ... | response G]."""
        group, inputs = batch.group_size, self.collate(batch.inputs)
        steps, prompt_tokens = batch.response_ids_NT.shape[1] - 1, inputs["input_ids"].shape[1]
        ids = batch.response_ids_NT[:, :-1].to(self.device).reshape(len(batch.inputs), group * steps)
        offsets = torch.arange(steps, device=self.device).repeat(group)  # every response restarts behind the prompt
        packed = self._append(inputs, ids, offsets)
        packed["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # 4-D: never read
        layout = shared_prompt.Layout.of(inputs["attention_mask"], group, steps)
        hidden: Tensor = self.model.base_model(**packed, shared_prompt=layout, use_cache=False).last_hidden_state
        first = hidden[:, prompt_tokens - 1 : prompt_tokens].repeat_interleave(group, 0)
        return torch.cat([first, hidden[:, prompt_tokens:].unflatten(1, (group, steps)).flatten(0, 1)], 1)

    @staticmethod
    def _append(inputs: dict[str, Tensor], ids: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """Inputs with further text tokens at positions ``next position + offsets`` of their row."""
        positions, width = inputs["position_ids"], ids.shape[1]
        following = next_positions(positions)[:, None] + offsets
        if positions.ndim == 3:
            following = following.expand(3, -1, -1)
        longer = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], ids], 1),
            "position_ids": torch.cat([positions, following], -1),
        }
        for name in inputs.keys() & {"mm_token_type_ids", "token_type_ids"}:
            longer[name] = nn.functional.pad(inputs[name], (0, width))
        return longer

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
