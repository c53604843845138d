"""How an update runs on one device or many: gradient exchange, clipping, streaming of weights.

``updates.py`` holds what modules ask of a strategy, ``collectives.py`` sums and gathers over ranks; importing the room
registers the strategies by name (``rl_ddp``).
"""

from rllava_pl.strategies.ddp import RLDDPStrategy, RLStrategyMixin

__all__ = ["RLDDPStrategy", "RLStrategyMixin"]
