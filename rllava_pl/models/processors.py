"""Loading the processor of a model directory: chat template, tokenizer and image processor in one object."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)


def load_processor(path: str | Path, *, revision: str | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of a model, or the tokenizer of a text-only one.

    Some processors (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, ...) carry a video processor, which transformers builds only with
    torchvision. Where that is missing, or where the directory was saved without a video processor, the processor is
    loaded for images only and one line in the log says that video is off. Code of the model's repository never runs.

    Args:
        path: Directory or hub name of the model.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ValueError: The directory holds neither a processor nor a tokenizer.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.import_utils import is_torchvision_available

    kind = type(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False))
    base = PROCESSOR_MAPPING.get(kind, None)
    if base is not None and "video_processor" in base.get_attributes():
        missing = "" if is_torchvision_available() else "torchvision is not installed"
        if not missing:
            parts, _ = ProcessorMixin.get_processor_dict(path, revision=revision)  # older layouts list no parts
            if "image_processor" in parts and "video_processor" not in parts:
                missing = "it was saved without a video processor"
        if missing:
            logger.info("%s: video input is off, %s; images work", path, missing)
            return image_only(base).from_pretrained(path, revision=revision)
    text_only = base is None and kind in MODEL_FOR_CAUSAL_LM_MAPPING  # it may name the processor of its VLM
    auto = AutoTokenizer if text_only else AutoProcessor
    processor = auto.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin | PreTrainedTokenizerBase):
        found = type(processor).__name__
        raise ValueError(f"{path} holds a {found} but no tokenizer; save the model's processor or tokenizer there")
    return processor


def image_only(base: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """``base`` without its video processor; everything about text and images is inherited.

    The subclass keeps the name of ``base``: a processor writes its class name into what it saves, and such a directory
    must name a class of transformers.

    Example: ``image_only(Qwen2VLProcessor)(image_processor, tokenizer, chat_template=template)``.

    Args:
        base: A processor class whose constructor takes ``video_processor`` after its other parts.
    """

    class ImageOnlyProcessor(base):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            """Names of the parts to load, check and save."""
            return [name for name in super().get_attributes() if name != "video_processor"]

    ImageOnlyProcessor.__doc__ = f"{base.__name__} for images only; video input is off."
    ImageOnlyProcessor.__name__ = ImageOnlyProcessor.__qualname__ = base.__name__
    return ImageOnlyProcessor
