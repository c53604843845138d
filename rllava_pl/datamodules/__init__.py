"""Prompts for RL: data modules for drawn images, handwritten digits, and your own files or Hugging Face data sets."""

from __future__ import annotations

from rllava_pl.datamodules.base import BaseDataModule
from rllava_pl.datamodules.digits import DigitsDataModule
from rllava_pl.datamodules.loader import PADDING, PromptLoader, PromptSampler
from rllava_pl.datamodules.prompts import PromptDataModule
from rllava_pl.datamodules.rejections import DataError, Rejection
from rllava_pl.datamodules.synthetic import SyntheticVisionDataModule

__all__ = [
    "PADDING",
    "BaseDataModule",
    "DataError",
    "DigitsDataModule",
    "PromptDataModule",
    "PromptLoader",
    "PromptSampler",
    "Rejection",
    "SyntheticVisionDataModule",
]
