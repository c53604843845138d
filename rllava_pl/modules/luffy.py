"""LUFFY: off-policy guidance inside the group."""

from __future__ import annotations

from torch import Tensor

from rllava_pl.functional import advantages, demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.checks import NOT_NEGATIVE, POSITIVE
from rllava_pl.modules.demonstrations import MixedGroupModule
from rllava_pl.types import Experience


class LUFFY(MixedGroupModule):
    """LUFFY (arXiv 2504.14945): a demonstration is one of the group, and its unlikely tokens are pulled hardest.

    A_i = r_i - mean(r) over G - 1 samples and the demonstration. Samples: -A·ρ. Demonstrations, whose behaviour
    probability counts as 1: -A·p/(p + γ), which shapes the gradient towards tokens with small p. Sum over tokens,
    divided by N·max_tokens.

    Args:
        shaping: γ; paper: 0.1.
        clip: Clip range of the samples' ratio; null, as in the paper: not clipped.
        aggregation: Paper: the sum over tokens, divided by a constant.
        entropy_coef: The authors' scripts: 0.001.
    """

    demonstrations_apart = False
    ranges = MixedGroupModule.ranges | {"shaping": POSITIVE, "clip": NOT_NEGATIVE}

    def __init__(
        self,
        *args,
        shaping: float = 0.1,
        clip: float | None = None,
        aggregation: ReduceMode = "constant",
        entropy_coef: float = 0.001,
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, entropy_coef=entropy_coef, **kwargs)
        self.shaping, self.clip = shaping, clip

    def advantages(self, experience: Experience) -> Tensor:
        """Reward - mean over the mixed group, (N,)."""
        return advantages.grpo(experience.rewards_N, experience.group_N, scale_by_std=False)

    def policy_loss(self, logp_NT: Tensor, batch: Experience) -> Tensor:
        """-A·ρ, and -A·p/(p + γ) on demonstrations."""
        return demonstrations.luffy(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.mask_NT,
            batch.demo_mask_NT,
            shaping=self.shaping,
            clip=self.clip,
        )
