"""Counters of a run: plain numbers, so that averaging weights does not average them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass
class RunState:
    """What a checkpoint keeps of a run beside weights, optimizer and data position."""

    rollouts: int = 0
    """Passes of the loop that have ended."""
    updates: int = 0
    """Optimizer steps in the present weights."""
    kl_factor: float = 1.0
    """Factor of both KL coefficients; an adaptive controller moves it."""
    sampled_at: int = -1
    """Optimizer steps in the weights that sampled the present rollout batch."""
    skipped_in_a_row: int = 0
    """Updates skipped since the last optimizer step, because a number was not finite."""
    saved_at_ns: int = 0
    """When the run was last saved; it only grows, also on a machine whose clock is behind."""

    @property
    def before_first_update(self) -> bool:
        """Whether the present rollout batch has had no optimizer step yet."""
        return self.updates == self.sampled_at

    def as_dict(self) -> dict[str, int | float]:
        """For a checkpoint."""
        return asdict(self)

    def load(self, saved: Mapping[str, int | float]) -> None:
        """Take over what ``as_dict`` returned."""
        for name, value in saved.items():
            setattr(self, name, value)

    def facts(self, options: Mapping[str, object]) -> dict[str, int | str]:
        """For the manifest of a checkpoint; of two checkpoints of a run the later one has the larger time."""
        self.saved_at_ns = max(time.time_ns(), self.saved_at_ns + 1)
        text = json.dumps(options, sort_keys=True, default=str)
        return {
            "rollouts": self.rollouts,
            "updates": self.updates,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "saved_at_ns": self.saved_at_ns,
        }
