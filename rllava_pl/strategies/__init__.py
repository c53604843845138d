"""How an update runs on one device or many: gradient exchange, clipping, streaming of weights.

``updates.py`` holds what modules ask of a strategy, ``collectives.py`` sums and gathers over ranks; importing the room
registers the strategies by name: ``rl_ddp``, ``rl_fsdp``, ``rl_fsdp2``, ``rl_deepspeed``.
"""

from rllava_pl.strategies.ddp import RLDDPStrategy, RLStrategyMixin
from rllava_pl.strategies.deepspeed import RLDeepSpeedStrategy
from rllava_pl.strategies.fsdp import RLFSDPStrategy
from rllava_pl.strategies.fsdp2 import RLFSDP2Strategy

__all__ = ["RLDDPStrategy", "RLDeepSpeedStrategy", "RLFSDP2Strategy", "RLFSDPStrategy", "RLStrategyMixin"]
