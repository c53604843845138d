"""One algorithm, one LightningModule, one short file; ``base.py`` holds the loop they share."""

from rllava_pl.modules.base import RLModule
from rllava_pl.modules.grpo import GRPO
from rllava_pl.modules.rloo import RLOO

__all__ = ["GRPO", "RLOO", "RLModule"]
