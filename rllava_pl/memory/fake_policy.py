"""A policy of fake tensors and what it reads, built from a config alone: no weights, no tokenizer, no picture."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rllava_pl.memory.settings import Prompts, Source
from rllava_pl.models.architectures import config_of
from rllava_pl.models.families import Family, family_of
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import add_lora, freeze
from rllava_pl.types import PolicyBatch, PromptInputs

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def depths(config: PreTrainedConfig) -> tuple[int, int]:
    """Layers of the language model and blocks of the vision tower, 0 without one."""
    vision = getattr(config, "vision_config", None)
    blocks = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 0)
    return config.get_text_config().num_hidden_layers, blocks


def shortened(config: PreTrainedConfig, layers: int, blocks: int) -> PreTrainedConfig:
    """The same architecture with fewer layers: everything that counts them follows."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    vision = getattr(config, "vision_config", None)
    if vision is not None and blocks:
        setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", blocks)
        if getattr(vision, "deepstack_visual_indexes", None):
            vision.deepstack_visual_indexes = list(range(min(len(vision.deepstack_visual_indexes), blocks)))
        if getattr(vision, "fullatt_block_indexes", None):
            vision.fullatt_block_indexes = [blocks - 1]
    return config


def phantom_model(source: Source, config: PreTrainedConfig) -> PreTrainedModel:
    """The model as it would be trained, without memory (``meta``)."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with no_init_weights(), torch.device("meta"):
        model = auto.from_config(
            config, dtype=getattr(torch, source.dtype), attn_implementation=source.attn_implementation
        )
        model.tie_weights()
        freeze(model, source.freeze)
        if source.lora is not None:
            add_lora(model, source.lora)
    if source.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def phantom_policy(source: Source, fake: FakeTensorMode, layers: int, blocks: int) -> Policy:
    """A policy with so many layers whose weights are fake."""
    model = phantom_model(source, shortened(config_of(source.path, source.revision), layers, blocks))
    _make_fake(model, fake)
    policy = Policy(model, _phantom_tokenizer(), share_prompt=source.share_prompt)
    return policy.train(source.gradient_checkpointing)


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Fake tensors on a CPU in place of parameters and buffers; tied ones stay tied."""
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


def _phantom_tokenizer() -> PreTrainedTokenizerBase:
    """Two tokens: the policy asks for an end token and a pad token, and nothing is ever tokenised."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def layers_of(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Layers of the language model (``text``) and of the vision tower (``vision``), in the order they run."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = {id(module) for module in model.get_decoder().modules()}
    layers: dict[str, list[nn.Module]] = {"text": [], "vision": []}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            layers["text" if id(module) in decoder else "vision"].append(module)
    return layers


def phantom_batch(
    policy: Policy, fake: FakeTensorMode, *, prompts: int, members: int, response_tokens: int, prompt: Prompts
) -> PolicyBatch:
    """``prompts`` equal prompts with ``members`` full responses each; pixels are fake, everything else is real."""
    inputs = phantom_prompt(policy.model.config, family_of(policy.model), prompt, fake)
    shape, word = (prompts * members, response_tokens), int(inputs.input_ids_S[0])
    mask_NT = torch.ones(shape, dtype=torch.bool)
    return PolicyBatch((inputs,) * prompts, members, torch.full(shape, word), mask_NT)


def phantom_prompt(config: PreTrainedConfig, family: Family, prompt: Prompts, fake: FakeTensorMode) -> PromptInputs:
    """A prompt of the family: images with a word in front of each, then text; longer than asked if they need it."""
    image_id = getattr(config, "image_token_id", None)
    image_id = getattr(config, "image_token_index", None) if image_id is None else image_id
    images: dict[str, Tensor] = {}
    each = 0
    if prompt.images and image_id is not None and family.causal:
        images, each = _one_image(config, family, prompt.image_tokens, fake)
    count = prompt.images if images else 0
    ids_S = torch.full((max(prompt.tokens, count * (each + 1) + 1),), next(i for i in range(2, 4) if i != image_id))
    for k in range(count):
        start = 1 + k * (each + 1)
        ids_S[start : start + each] = image_id
    tokens = {"mm_token_type_ids": (ids_S == image_id).long()} if count and family.image_axis == "patch" else {}
    with fake:
        joined = {n: torch.cat([x] * count) if x.is_floating_point() else x for n, x in images.items()}
    joined |= {n: torch.cat([x] * count) for n, x in images.items() if not x.is_floating_point()}
    return PromptInputs(ids_S, tokens, joined)


def _one_image(
    config: PreTrainedConfig, family: Family, tokens: int, fake: FakeTensorMode
) -> tuple[dict[str, Tensor], int]:
    """Vision inputs of one image that becomes at least ``tokens`` tokens, and how many it becomes."""
    vision = config.vision_config
    shape: tuple[int, ...]
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    if family.image_axis == "patch":
        merge, height = vision.spatial_merge_size, max(1, math.isqrt(tokens))
        width = math.ceil(tokens / height)
        grid = torch.tensor([[1, height * merge, width * merge]])
        shape, inputs = (
            (int(grid.prod()), channels * vision.temporal_patch_size * vision.patch_size**2),
            {"image_grid_thw": grid},
        )
    else:
        per_tile = (vision.image_size // vision.patch_size) ** 2 // getattr(config, "scale_factor", 1) ** 2
        tiles = max(1, math.ceil(tokens / per_tile))
        height, width, inputs = tiles, per_tile, {}
        shape = (tiles, channels, vision.image_size, vision.image_size)
    with fake:
        return {"pixel_values": torch.empty(shape), **inputs}, height * width
