"""How the tiny model of each family is put together: config, image processor, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rllava_pl.models.processors import image_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

IMAGE_SIZE = 56
PATCH_SIZE = 14
HIDDEN = 64
_NORMALISED: Mapping[str, list[float]] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
HEADS = 2  # head_dim 32: the smallest that vLLM's CPU attention supports


@dataclass(frozen=True)
class TinyFamily:
    """How the tiny model of one family is put together."""

    image_text: str
    """What the chat template writes for an image, before the processor expands it."""
    visual_tokens: tuple[str, ...]
    named_tokens: tuple[tuple[str, str], ...]
    """Attributes of the tokenizer by which the processor finds its tokens."""
    config: Callable[[PreTrainedTokenizerFast], dict[str, object]]
    """Arguments of the model's config."""
    processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin]
    video: Mapping[str, object] = field(default_factory=dict)
    """Settings of a video processor, for engines that require one even without videos."""


def _text(tokenizer: PreTrainedTokenizerFast, **special: object) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # at this width the usual 0.02 leaves the logits almost flat
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **special,
    }


def _vision(**special: object) -> dict[str, object]:
    return {"hidden_size": HIDDEN, "patch_size": PATCH_SIZE, "initializer_range": 0.1, **special}


def _siglip(**special: object) -> dict[str, object]:
    depth = {"num_hidden_layers": 2, "num_attention_heads": HEADS}
    return _vision(intermediate_size=2 * HIDDEN, image_size=IMAGE_SIZE, **depth, **special)


def _idefics3(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "text_config": _text(tokenizer, model_type="llama"),
        "vision_config": _siglip(),
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
    }


def _idefics3_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False, **_NORMALISED)
    # 56 / 14 = 4 x 4 patches, shuffled 2 x 2 into one token each: 4 tokens an image
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


def _llava(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "text_config": _text(tokenizer, model_type="llama"),
        "vision_config": _siglip(model_type="siglip_vision_model", vision_use_head=False),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import LlavaProcessor, SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **_NORMALISED)
    options = {"vision_feature_select_strategy": "full", "chat_template": tokenizer.chat_template}
    return LlavaProcessor(images, tokenizer, patch_size=PATCH_SIZE, **options)


def _qwen(
    name: str, rope: dict[str, object], vision: dict[str, object], version: str = "2", **text: object
) -> TinyFamily:
    """A family whose processor class is ``<name>Processor``, with the video processor of a version of Qwen-VL."""
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    area = IMAGE_SIZE * IMAGE_SIZE
    patches = {"patch_size": PATCH_SIZE, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {**patches, "size": {"shortest_edge": area, "longest_edge": area}}

    def config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
        # Axes time, height, width share the 16 = head_dim / 2 rotary frequencies.
        rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], **rope}
        return {
            "text_config": _text(tokenizer, rope_parameters=rotary, **text),
            "vision_config": _vision(depth=2, num_heads=HEADS, **vision),
            **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, tokens, strict=True)},
        }

    def processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        import transformers

        images = transformers.Qwen2VLImageProcessorPil(**pixels, **_NORMALISED)
        base = image_only(getattr(transformers, f"{name}Processor"))
        return base(images, tokenizer, chat_template=tokenizer.chat_template)

    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    video = {"video_processor_type": f"Qwen{version}VLVideoProcessor", **pixels}
    return TinyFamily(slot, tokens, tuple(zip(names, tokens, strict=True)), config, processor, video)


_MLP = {"out_hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
_IMAGE_TOKEN = (("image_token", "<image>"),)
_IDEFICS3_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")

TINY_FAMILIES = {
    "idefics3": TinyFamily("<image>", _IDEFICS3_TOKENS, _IMAGE_TOKEN, _idefics3, _idefics3_processor),
    "llava": TinyFamily("<image>", ("<image>",), _IMAGE_TOKEN, _llava, _llava_processor),
    "qwen2_vl": _qwen("Qwen2VL", {}, {"embed_dim": HIDDEN, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen("Qwen2_5_VL", {}, {**_MLP, "fullatt_block_indexes": [0, 1], "window_size": IMAGE_SIZE}),
    "qwen3_vl": _qwen(
        "Qwen3VL",
        {"mrope_interleaved": True},
        {**_MLP, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        version="3",
        head_dim=HIDDEN // HEADS,
    ),
}
"""By family; the keys are those of ``families.FAMILIES``."""
