"""How the tiny model of each family is put together: config, image processor, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rllava_pl.models.processors import image_only

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

    MakeConfig = Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    MakeProcessor = Callable[[PreTrainedTokenizerFast], ProcessorMixin]

IMAGE_SIZE = 56
PATCH_SIZE = 14
HIDDEN = 64
HEADS = 2  # head_dim 32: the smallest that vLLM's CPU attention supports


@dataclass(frozen=True)
class TinyFamily:
    """How the tiny model of one family is put together."""

    image_text: str
    """What the chat template writes for an image, before the processor expands it."""
    visual_tokens: tuple[str, ...]
    named_tokens: tuple[tuple[str, str], ...]
    """Attributes of the tokenizer by which the processor finds its tokens."""
    config: MakeConfig
    processor: MakeProcessor
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


def _idefics3_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "idefics3",
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_siglip(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def _idefics3_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(
        size=size, max_image_size=size, do_image_splitting=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    # 56 / 14 = 4 x 4 patches, shuffled 2 x 2 into one token each: 4 tokens an image
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


def _llava_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llava",
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_siglip(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import LlavaProcessor, SiglipImageProcessorPil

    images = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    template = tokenizer.chat_template
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="full", chat_template=template
    )


def _qwen_config(family: str, rope: dict[str, object], vision: dict[str, object], **text: object) -> MakeConfig:
    def config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        from transformers import AutoConfig

        # Axes time, height, width share the 16 = head_dim / 2 rotary frequencies.
        rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], **rope}
        return AutoConfig.for_model(
            family,
            text_config=_text(tokenizer, rope_parameters=rotary, **text),
            vision_config=_vision(depth=2, num_heads=HEADS, **vision),
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
            tie_word_embeddings=True,
        )

    return config


def _qwen_processor(class_name: str) -> MakeProcessor:
    def processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        import transformers

        area = IMAGE_SIZE * IMAGE_SIZE
        images = transformers.Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": area, "longest_edge": area},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        base = getattr(transformers, class_name)
        return image_only(base)(images, tokenizer, chat_template=tokenizer.chat_template)

    return processor


def _qwen(class_name: str, config: MakeConfig, video_class: str = "Qwen2VLVideoProcessor") -> TinyFamily:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    area = IMAGE_SIZE * IMAGE_SIZE
    video = {
        "video_processor_type": video_class,
        "patch_size": PATCH_SIZE,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": area, "longest_edge": area},
    }
    return TinyFamily(slot, tokens, tuple(zip(names, tokens, strict=True)), config, _qwen_processor(class_name), video)


_MLP = {"out_hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
_IMAGE_TOKEN = (("image_token", "<image>"),)
_IDEFICS3_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")

TINY_FAMILIES = {
    "idefics3": TinyFamily("<image>", _IDEFICS3_TOKENS, _IMAGE_TOKEN, _idefics3_config, _idefics3_processor),
    "llava": TinyFamily("<image>", ("<image>",), _IMAGE_TOKEN, _llava_config, _llava_processor),
    "qwen2_vl": _qwen("Qwen2VLProcessor", _qwen_config("qwen2_vl", {}, {"embed_dim": HIDDEN, "mlp_ratio": 2})),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor",
        _qwen_config("qwen2_5_vl", {}, {**_MLP, "fullatt_block_indexes": [0, 1], "window_size": IMAGE_SIZE}),
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor",
        _qwen_config(
            "qwen3_vl",
            {"mrope_interleaved": True},
            {**_MLP, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            head_dim=HIDDEN // HEADS,
        ),
        "Qwen3VLVideoProcessor",
    ),
}
"""By family; the keys are those of ``families.FAMILIES``."""
