"""Learning-rate factors as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal, get_args

from rllava_pl.functional._numerics import check_choice

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int, final_ratio: float = 0.0) -> float:
    """Factor on the learning rate at an optimizer step: linear warm-up to 1, then constant or a decay.

    Warm-up gives ``(step + 1) / warmup_steps``, so the first step already moves. The decay runs from 1 at
    ``warmup_steps`` to ``final_ratio`` at ``total_steps`` and stays there: with ``x`` from 0 to 1 on the way,
    ``final_ratio + (1 - final_ratio) * s(x)`` where ``s`` is ``1 - x`` (linear) or ``(1 + cos(pi * x)) / 2`` (cosine).

    Args:
        step: Optimizer steps done so far, from 0.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        warmup_steps: Steps of warm-up; 0: none.
        total_steps: Step at which the decay ends; ``"constant"`` does not use it.
        final_ratio: Factor at the end of the decay, 0 to 1.

    Raises:
        ValueError: unknown schedule, negative steps, ``final_ratio`` outside of [0, 1], or no steps left for the decay.

    >>> [lr_factor(step, schedule="linear", warmup_steps=2, total_steps=6) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_choice("schedule", schedule, get_args(Schedule))
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 (no warm-up) or positive")
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio is {final_ratio}; it must lie between 0 and 1")
    if schedule != "constant" and total_steps <= warmup_steps:
        raise ValueError(
            f"schedule {schedule!r} decays from warmup_steps={warmup_steps} to total_steps={total_steps}, which leaves "
            f"{total_steps} - {warmup_steps} = {total_steps - warmup_steps} steps for it; "
            "raise total_steps, lower warmup_steps or use 'constant'"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_ratio + (1 - final_ratio) * remaining
