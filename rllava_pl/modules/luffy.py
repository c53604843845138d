"""LUFFY: off-policy guidance inside the group."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import require
from rllava_pl.modules.demonstrations import MixedGroupModule, mixed_inputs
from rllava_pl.types import RewardedBatch, TrainingBatch


class LUFFY(MixedGroupModule):
    """LUFFY (arXiv 2504.14945): a demonstration is one of the group, and its unlikely tokens are pulled hardest.

    A_i = r_i - mean(r) over G - 1 samples and the demonstration. Samples: -A·ρ. Demonstrations, whose behaviour
    probability counts as 1: -A·p/(p + γ), which shapes the gradient towards tokens with small p. Sum over tokens,
    divided by N·max_tokens.

    Args:
        shaping: γ; paper: 0.1.
        ratio_clip: Clip range of the samples' ratio; null, as in the paper: not clipped.
        aggregation: Paper: the sum over tokens, divided by a constant.
        entropy_coef: The authors' scripts: 0.001.
    """

    imitation_term = False

    def __init__(
        self,
        *args,
        shaping: float = 0.1,
        ratio_clip: float | None = None,
        aggregation: ReduceMode = "constant",
        entropy_coef: float = 0.001,
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, entropy_coef=entropy_coef, **kwargs)
        self.shaping, self.ratio_clip = shaping, ratio_clip
        require(shaping > 0, "shaping", shaping, "larger than 0")
        require(ratio_clip is None or ratio_clip >= 0, "ratio_clip", ratio_clip, "at least 0, or null")

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """Reward - mean over the mixed group, (N,)."""
        return advantages.grpo(batch.rewards_N, batch.group_N, scale_by_std=False)

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """-A·ρ, and -A·p/(p + γ) on demonstrations."""
        return demonstrations.luffy(logp_NT, *mixed_inputs(batch), shaping=self.shaping, clip=self.ratio_clip)
