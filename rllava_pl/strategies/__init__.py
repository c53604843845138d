"""Distribution over devices: how gradients are exchanged and clipped, and how weights are stored and streamed.

``adapter.py`` is what the training loop needs of any strategy. Importing the package registers the strategies by name:
``rl_ddp``, ``rl_fsdp``, ``rl_fsdp2``, ``rl_deepspeed``.
"""

from rllava_pl.strategies.adapter import StrategyAdapter, adapter_for
from rllava_pl.strategies.ddp import RLDDPStrategy, RLStrategyMixin
from rllava_pl.strategies.deepspeed import RLDeepSpeedStrategy
from rllava_pl.strategies.fsdp import RLFSDP2Strategy, RLFSDPStrategy

__all__ = [
    "RLDDPStrategy",
    "RLDeepSpeedStrategy",
    "RLFSDP2Strategy",
    "RLFSDPStrategy",
    "RLStrategyMixin",
    "StrategyAdapter",
    "adapter_for",
]
