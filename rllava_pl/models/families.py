"""The differences between families of vision-language models, as data.

A family that follows the transformers conventions needs no entry: it loads, samples and trains in the plain form. An
entry names its vision modules and special tokens and states whether the shared-prompt form is exact for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ImageAxis = Literal["prompt", "image", "patch"]


@dataclass(frozen=True)
class Family:
    """One row of the table: what the policy needs to know about a model type."""

    vision_tower: str = "*vision*"
    """Glob of the tower's parameter names."""
    connector: str = "*projector*"
    """Glob of the parameters between tower and language model."""
    visual_tokens: tuple[str, ...] = ()
    """Special tokens that only the processor writes; never sampled, whether the config names them or not."""
    image_axis: ImageAxis = "image"
    """First axis of ``pixel_values``: one row a prompt (with an image axis behind it), one an image, or one a patch."""
    causal: bool = False
    """True where every layer is plain causal softmax attention, images included: the shared-prompt form is exact."""


_QWEN_VISION = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
_QWEN = Family("model.visual.*", "model.visual.*merger*", _QWEN_VISION, "patch", causal=True)
_IDEFICS_VISION = ("<image>", "<fake_token_around_image>", "<global-img>")
_IDEFICS = Family("model.vision_model.*", "model.connector.*", _IDEFICS_VISION, "prompt", causal=True)
_TEXT = Family(vision_tower="", connector="", causal=True)

FAMILIES: dict[str, Family] = {
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava": Family("model.vision_tower.*", "model.multi_modal_projector.*", ("<image>",), "image", causal=True),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llama": _TEXT,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
}
"""By ``config.model_type``; families that are not here use ``Family()`` and the plain form."""


def family_of(model: PreTrainedModel) -> Family:
    """The table's row for a loaded model, or the defaults."""
    return FAMILIES.get(model.config.model_type, Family())


def banned_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that must never be sampled: a placeholder without an image makes the sequence impossible to score again.

    They are the family's visual tokens, every image, video or vision token id that the model's config names, and every
    visual added token of the tokenizer, as far as the vocabulary has them. Sorted, without repeats.
    """
    visual = [*family_of(model).visual_tokens, *filter(is_visual, tokenizer.get_added_vocab())]
    ids = {*tokenizer.convert_tokens_to_ids(visual)}
    for name, value in model.config.to_dict().items():
        if name.startswith(("image_token", "video_token", "vision_")) and name.endswith(("_id", "_index")):
            ids |= {value} if isinstance(value, int) else set()
    vocabulary = model.config.get_text_config().vocab_size
    return sorted(i for i in ids - {None, tokenizer.unk_token_id} if 0 <= i < vocabulary)


def is_visual(token: str) -> bool:
    """Whether an added token stands for image or video content, by its name."""
    return any(word in token for word in ("image", "img", "video", "vision", "<row_"))
