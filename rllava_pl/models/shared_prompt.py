"""One prompt for its whole group, with gradients, and no padding.

The G completions of a prompt share its images and its text. Here they share the computation as well, and all prompts of
a batch are concatenated to one row:

    [ prompt 1 | response 11 | ... | response 1G | prompt 2 | response 21 | ... ]

Attention treats the parts separately: prompt tokens attend to their prompt, the tokens of a response to their prompt
and to their own response. Every position is computed once, whatever G is. For a causal model that is exact: a prompt
never attends to a response, so its keys and values are the same for all of them, and their gradients add up. Cost:
P·S + N·R tokens in their real length, and P·S² + N·R·(S + R) attention pairs as wide as the longest, against N·(S + R)
tokens and N·(S + R)² pairs, padding included, when the prompt is repeated.

The attention function is registered with transformers under ``shared_prompt`` and falls through to SDPA when a call
carries no layout, so that sampling and ordinary forwards do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rllava_pl.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "shared_prompt"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed row belong: prompts (P, S) and responses (N, R), both padded on the right."""

    prompt_slots_PS: Tensor
    """int64: place in the row of every prompt token; anywhere in the row at padding."""
    response_slots_NR: Tensor
    """int64: place in the row of every response token; anywhere in the row at padding."""
    order_L: Tensor
    """int64 (L,): of every token of the row, its place among the P·S prompt tokens followed by the N·R of responses."""
    last_P: Tensor
    """int64: place in the row of each prompt's last token."""
    seen: Tensor
    """bool (N, 1, R, S + R), or (1, 1, R, S + R) where all prompts are equally long: what a response attends to."""

    @classmethod
    def of(cls, prompt_lengths: Sequence[int], response_lengths: Sequence[int], device: torch.device) -> Layout:
        """The layout of P prompts, each followed by its part of N = P·G responses; lengths in tokens."""
        prompt_P, response_N = torch.tensor(prompt_lengths), torch.tensor(response_lengths)
        length = torch.cat([prompt_P[:, None], response_N.view(len(prompt_P), -1)], 1)
        start = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
        prompt_slots_PS, prompt_valid_PS = _slots(start[:, 0], prompt_P)
        response_slots_NR, response_valid_NR = _slots(start[:, 1:].flatten(), response_N)
        valid = torch.cat([prompt_valid_PS.flatten(), response_valid_NR.flatten()])
        slots = torch.cat([prompt_slots_PS.flatten(), response_slots_NR.flatten()])
        order_L = torch.empty(int(length.sum()), dtype=torch.int64)
        order_L[slots[valid]] = valid.nonzero()[:, 0]
        steps, group_size = response_slots_NR.shape[1], len(response_N) // len(prompt_P)
        causal = torch.ones(steps, steps, dtype=torch.bool).tril()
        seen = prompt_valid_PS[:1] if prompt_valid_PS.all() else prompt_valid_PS.repeat_interleave(group_size, 0)
        seen = torch.cat([seen[:, None].expand(-1, steps, -1), causal.expand(len(seen), -1, -1)], -1)[:, None]
        parts = (prompt_slots_PS, response_slots_NR, order_L, start[:, 0] + prompt_P - 1, seen)
        return cls(*(part.to(device, non_blocking=True) for part in parts))

    def row(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """(..., P, S) and (..., N, R), both padded on the right, as (..., L)."""
        return torch.cat([prompts.flatten(-2), responses.flatten(-2)], -1).index_select(-1, self.order_L)

    def predictors(self, mask_NT: Tensor) -> Tensor:
        """int64 (M,): place of the token that predicts each response token whose mask is True, row by row.

        The last token of a prompt predicts the first of all its responses.
        """
        first_N = self.last_P.repeat_interleave(len(self.response_slots_NR) // len(self.last_P))
        slots_NT = torch.cat([first_N[:, None], self.response_slots_NR], 1)[: len(mask_NT)]
        return slots_NT[mask_NT[:, : slots_NT.shape[1]]]

    def states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, L, d) -> prompts (P, heads, S, d) and responses (N, heads, R, d)."""
        tokens = x[0].transpose(0, 1)
        prompts, responses = (
            tokens.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
            for slots in (self.prompt_slots_PS, self.response_slots_NR)
        )
        return prompts, responses

    def join(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """(P, heads, S, d) and (N, heads, R, d) -> (1, L, heads, d)."""
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (prompts, responses)]
        return torch.cat(tokens).index_select(0, self.order_L)[None]

    def behind(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Each response behind its prompt: (N, heads, S + R, d)."""
        return torch.cat([prompts.repeat_interleave(len(responses) // len(prompts), 0), responses], 2)


def _slots(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Places (rows, longest) of parts that begin at ``start``, and which of them are no padding."""
    steps = torch.arange(int(length.max()))
    valid = steps < length[:, None]
    return torch.where(valid, start[:, None] + steps, 0), valid


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prompt: Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over a packed row, in the signature of transformers' attention interface; SDPA without a layout."""
    if shared_prompt is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layout = shared_prompt
    if key.is_cuda and (repeats := query.shape[1] // key.shape[1]) > 1:  # masked grouped heads have no fast CUDA kernel
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    (query_prompt, query_response), (key_prompt, key_response), (value_prompt, value_response) = map(
        layout.states, (query, key, value)
    )
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    # Padding follows the tokens of a prompt, so causality hides it.
    prompts = sdpa(query_prompt, key_prompt, value_prompt, is_causal=True, **options)
    keys, values = layout.behind(key_prompt, key_response), layout.behind(value_prompt, value_response)
    responses = sdpa(query_response, keys, values, attn_mask=layout.seen, **options)
    return layout.join(prompts, responses), None


def enable(model: PreTrainedModel) -> bool:
    """Switch the text part of ``model`` to shared-prompt attention; True if it took.

    False, and nothing changed, for a family that is not known to be plain causal attention throughout (sliding windows,
    linear or state-space layers, bidirectional image tokens), or one whose attention cannot be exchanged.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", False)
    if not family_of(model).causal or layers != {"full_attention"} or windowed or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation({"text_config": NAME} if config is not model.config else NAME)
    return bool(config._attn_implementation == NAME)
