"""AdamW on the host: weights on the accelerator, everything else of the optimizer in the machine's memory.

================ =======================================================================
``optimizer``    ``HostAdamW``: the step
``gradients``    sums of gradients, taken from the accelerator while backward runs
``storage``      moments and master weights at rest: fp32, bf16, 8 bits
``lanes``        copies between accelerator and host
================ =======================================================================
"""

from rllava_pl.optim.host_adamw import HostAdamW

__all__ = ["HostAdamW"]
