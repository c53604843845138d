"""The policy behind one interface: loading, freezing, adapters, a forward from prompts and responses to log-probs."""

from rllava_pl.models.trainable import LoRA
from rllava_pl.models.vlm import VLM, TinyVLM

__all__ = ["VLM", "LoRA", "TinyVLM"]
