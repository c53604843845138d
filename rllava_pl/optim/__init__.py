"""AdamW on the host: weights on the accelerator, gradients and optimizer states in host memory.

=============== ======================================================================
``host_adamw``  ``HostAdamW``: the step
``gradients``   sums of gradients, copied from the accelerator during backward
``states``      moments and master weights between steps: fp32, bf16 or 8 bits
``transfer``    copies between accelerator and host
=============== ======================================================================
"""

from rllava_pl.optim.host_adamw import HostAdamW

__all__ = ["HostAdamW"]
