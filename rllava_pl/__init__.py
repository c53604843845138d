"""RL post-training of vision-language models, native to PyTorch Lightning.

One algorithm is one ``LightningModule``: ``from rllava_pl.modules import GRPO`` works in any Lightning project, and
``python -m rllava_pl fit --config ...`` runs it from YAML. Importing the package itself loads nothing else.
"""

__version__ = "0.1.0"
