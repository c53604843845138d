"""One prompt for its whole group, with gradients.

The G completions of a prompt share its images and its text. Here they share the computation as well: one row holds

    [ prompt | response 1 | ... | response G ]

and attention treats the parts apart: prompt tokens attend to the prompt, the tokens of a response to the prompt and to
their own response. Every position is computed once, whatever G is. For a causal model that is exact: the prompt never
sees a response, so its keys and values are the same for all of them, and their gradients add up. Cost: P + G·R tokens
and P² + G·R·(P + R) attention pairs a row, against G·(P + R) tokens and G·(P + R)² pairs when the prompt is repeated.

The attention function is registered with transformers under ``shared_prompt`` and falls through to SDPA when a call
carries no layout, so that sampling and ordinary forwards are untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rllava_pl.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "shared_prompt"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed row stand, and who may attend to whom (True = may)."""

    prompt_tokens: int
    """S: width of the left-padded prompts."""
    group_size: int
    """G responses behind each prompt."""
    response_tokens: int
    """R tokens of each response that serve as input."""
    prompt_mask: Tensor | None
    """bool (P, 1, S, S); None: plain causal, no prompt is padded."""
    response_mask: Tensor
    """bool (N, 1, R, S + R), or (1, 1, R, S + R) when no prompt is padded."""

    @classmethod
    def of(cls, attention_PS: Tensor, group_size: int, response_tokens: int) -> Layout:
        """The layout of ``group_size`` responses behind left-padded prompts whose padding is 0 in ``attention_PS``."""
        prompts, width = attention_PS.shape
        valid = attention_PS.bool()
        causal = torch.ones(response_tokens, response_tokens, dtype=torch.bool, device=valid.device).tril()
        seen = valid[:, None].expand(-1, response_tokens, -1)
        response = torch.cat([seen, causal.expand(prompts, -1, -1)], -1)[:, None]
        if bool(valid.all()):
            return cls(width, group_size, response_tokens, None, response[:1])
        lower = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=valid.device)  # pads see themselves: no empty softmax row
        prompt = ((valid[:, None] & lower) | itself)[:, None]
        return cls(width, group_size, response_tokens, prompt, response.repeat_interleave(group_size, 0))

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(P, heads, S + G·R, d) -> prompts (P, heads, S, d) and responses (N, heads, R, d)."""
        prompt, responses = x.split([self.prompt_tokens, self.group_size * self.response_tokens], dim=2)
        return prompt, responses.unflatten(2, (self.group_size, self.response_tokens)).transpose(1, 2).flatten(0, 1)

    def join(self, prompt: Tensor, responses: Tensor) -> Tensor:
        """Inverse of ``cut``."""
        return torch.cat([prompt, responses.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)], 2)

    def behind(self, prompt: Tensor, responses: Tensor) -> Tensor:
        """Each response behind its prompt: (N, heads, S + R, d)."""
        return torch.cat([prompt.repeat_interleave(self.group_size, 0), responses], 2)


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
    """Attention over packed rows, in the signature of transformers' attention interface; SDPA without a layout."""
    if shared_prompt is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layout = shared_prompt
    if key.is_cuda and (repeats := query.shape[1] // key.shape[1]) > 1:  # masked grouped heads have no fast CUDA kernel
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    (query_prompt, query_response), (key_prompt, key_response), (value_prompt, value_response) = map(
        layout.cut, (query, key, value)
    )
    grouped = key.shape[1] != query.shape[1]
    prompt = sdpa(
        query_prompt,
        key_prompt,
        value_prompt,
        attn_mask=layout.prompt_mask,
        is_causal=layout.prompt_mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=grouped,
    )
    responses = sdpa(
        query_response,
        layout.behind(key_prompt, key_response),
        layout.behind(value_prompt, value_response),
        attn_mask=layout.response_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=grouped,
    )
    return layout.join(prompt, responses).transpose(1, 2).contiguous(), None


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
