"""A policy of fake tensors and its inputs, built from a config: no weights, no tokenizer and no image is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rllava_pl.memory.settings import PlannedModel, PromptSize
from rllava_pl.models.architectures import config_of
from rllava_pl.models.families import Family, family_of
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import add_lora, freeze
from rllava_pl.types import PolicyBatch, PromptInputs

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(planned: PlannedModel) -> PreTrainedModel:
    """The model as it would be trained, on the ``meta`` device, with adapters and frozen parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = config_of(planned.path, planned.revision)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with no_init_weights(), torch.device("meta"):
        model = auto.from_config(
            config, dtype=getattr(torch, planned.dtype), attn_implementation=planned.attn_implementation
        )
        model.tie_weights()
        freeze(model, planned.freeze)
        if planned.lora is not None:
            add_lora(model, planned.lora)
    if planned.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Layers of the language model and of the vision tower."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def fake_policy(planned: PlannedModel, fake: FakeTensorMode) -> Policy:
    """A policy whose weights and buffers are fake CPU tensors; tied ones stay tied."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = meta_model(planned)
    made: dict[int, Tensor] = {}

    def fake_of(x: Tensor) -> Tensor:
        if id(x) not in made:
            with fake:
                y = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu")
            made[id(x)] = nn.Parameter(y, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else y
        return made[id(x)]

    for module in list(model.modules()):
        for tensors in (cast("dict[str, Tensor | None]", module._parameters), module._buffers):
            tensors.update({name: fake_of(x) for name, x in tensors.items() if x is not None})
    # The policy needs an end token and a pad token, and tokenizes nothing here.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    return Policy(model, tokenizer, share_prompt=planned.share_prompt).train(planned.gradient_checkpointing)


def fake_batch(
    policy: Policy, fake: FakeTensorMode, *, prompts: int, group_size: int, response_tokens: int, prompt: PromptSize
) -> PolicyBatch:
    """Equal prompts with ``group_size`` responses of full length each; pixels are fake, everything else is real."""
    inputs = fake_prompt(policy.model.config, family_of(policy.model), prompt, fake)
    shape, token_id = (prompts * group_size, response_tokens), int(inputs.input_ids_S[0])
    mask_NT = torch.ones(shape, dtype=torch.bool)
    return PolicyBatch((inputs,) * prompts, group_size, torch.full(shape, token_id), mask_NT)


def fake_prompt(config: PreTrainedConfig, family: Family, prompt: PromptSize, fake: FakeTensorMode) -> PromptInputs:
    """A prompt of images, each after one text token, and then text; longer than wanted if the images need it."""
    image_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    count = prompt.images if image_id is not None and family.causal else 0
    images, image_tokens = _fake_images(config, family, prompt.image_tokens, count, fake) if count else ({}, 0)
    length = max(prompt.tokens, count * (image_tokens + 1) + 1)
    ids_S = torch.full((length,), next(i for i in range(2, 4) if i != image_id))
    for k in range(count):
        start = 1 + k * (image_tokens + 1)
        ids_S[start : start + image_tokens] = image_id
    tokens = {"mm_token_type_ids": (ids_S == image_id).long()} if count and family.image_axis == "patch" else {}
    return PromptInputs(ids_S, tokens, images)


def _fake_images(
    config: PreTrainedConfig, family: Family, tokens: int, count: int, fake: FakeTensorMode
) -> tuple[dict[str, Tensor], int]:
    """Vision inputs of ``count`` images of at least ``tokens`` tokens each, and the number of tokens of one."""
    vision, inputs = config.vision_config, {}
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    shape: tuple[int, ...]
    if family.image_axis == "patch":
        merge, height = vision.spatial_merge_size, max(1, math.isqrt(tokens))
        width = math.ceil(tokens / height)
        inputs = {"image_grid_thw": torch.tensor([[1, height * merge, width * merge]] * count)}
        shape = (count * height * width * merge**2, channels * vision.temporal_patch_size * vision.patch_size**2)
    else:
        width = (vision.image_size // vision.patch_size) ** 2 // getattr(config, "scale_factor", 1) ** 2
        height = max(1, math.ceil(tokens / width))
        shape = (count * height, channels, vision.image_size, vision.image_size)
    with fake:
        return {"pixel_values": torch.empty(shape), **inputs}, height * width
