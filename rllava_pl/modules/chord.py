"""CHORD: harmonised on- and off-policy learning."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.demonstrations import ChordWeighting
from rllava_pl.loop.options import require_range
from rllava_pl.modules.demonstrations import BesideGroupModule, mixed_inputs
from rllava_pl.types import RewardedBatch, TrainingBatch


class CHORD(BesideGroupModule):
    """CHORD (arXiv 2508.11408): imitation as a second loss, weighed as a whole by μ and token by token by φ.

    (1 - μ)·GRPO over the samples, mean over their tokens, - μ·φ·log π over the demonstrations, mean over theirs;
    φ = p(1 - p) spares tokens that are nearly certain and tokens that are out of reach.

    Args:
        mu: μ, or its peak; with decay steps it falls by a cosine to the valley.
        weighting: "phi": p(1 - p); "p": p; "none": 1, which is CHORD-μ.
        mu_warmup_steps: Rollouts of linear rise.
        mu_decay_steps: Rollouts of decay; 0: none.
        mu_valley: Where the decay ends.
        scale_by_std: Divide by the group's standard deviation.
    """

    def __init__(
        self,
        *args,
        mu: float = 0.1,
        weighting: ChordWeighting = "phi",
        mu_warmup_steps: int = 0,
        mu_decay_steps: int = 0,
        mu_valley: float = 0.02,
        scale_by_std: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mu, self.weighting, self.scale_by_std = mu, weighting, scale_by_std
        self.mu_warmup_steps, self.mu_decay_steps, self.mu_valley = mu_warmup_steps, mu_decay_steps, mu_valley
        require_range(self, "mu", "mu_valley", high=1.0)

    @property
    def current_mu(self) -> float:
        """μ of this rollout."""
        valley = self.mu_valley if self.mu_decay_steps else self.mu
        phases = {"warmup_steps": self.mu_warmup_steps, "decay_steps": self.mu_decay_steps}
        return demonstrations.chord_mu(self.state.rollouts, **phases, peak=self.mu, valley=valley)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """(r - mean) / std over the samples of a prompt, (N,)."""
        return advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=self.scale_by_std)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """(1 - μ)·clipped, and -μ·φ·log π on demonstrations."""
        return demonstrations.chord(
            logp_NT, *mixed_inputs(batch), mu=self.current_mu, weighting=self.weighting, **self.clip.range
        )
