"""UFT: unified fine-tuning with hints."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rllava_pl.functional import demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL
from rllava_pl.modules.demonstrations import DemonstrationModule, mixed_inputs
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import PromptBatch, Request, Rollout, TrainingBatch


class UFT(DemonstrationModule, GRPO):
    """UFT (arXiv 2505.16984): answers begin with a part of the demonstration, which grows shorter.

    The hint is the first l of L segments, l ~ Binomial(L, p), one draw a prompt; p falls from 0.95 to 0.05 over
    ``hint_steps`` rollouts and is 0 after. Sampled tokens: GRPO. Hint tokens: -β·log π, mean over theirs.

    Args:
        hint_coef: β; paper: 0.001.
        hint_steps: Rollouts with hints; the authors use 300 of 500.
        hint_segments: L: equal parts a demonstration is cut into, at most.
        aggregation: Paper: mean over tokens.
        kl: Paper: 0.001 in the loss.
    """

    given_metric = "hint_fraction"

    def __init__(
        self,
        *args,
        hint_coef: float = 0.001,
        hint_steps: int = 300,
        hint_segments: int = 5,
        aggregation: ReduceMode = "token-mean",
        kl: KL = KL(loss_coef=0.001),
        **kwargs,
    ) -> None:
        super().__init__(*args, aggregation=aggregation, kl=kl, **kwargs)
        self.hint_coef, self.hint_steps, self.hint_segments = hint_coef, hint_steps, hint_segments

    def sample(self, prompts: PromptBatch) -> list[Rollout]:
        """Completions of prompt and hint."""
        requests = self.requests(prompts, samples=self.group_size, stream="train")
        return self.engine.generate([replace(r, prefix_ids=self.hint(r)) for r in requests], self.sampling)

    def hint(self, request: Request) -> tuple[int, ...]:
        """The first l segments of the target, without its end token; none where there is no target."""
        rollout, uid = self.state.rollouts, request.prompt.uid
        p = demonstrations.uft_hint_probability(rollout, hint_steps=self.hint_steps)
        ids = self.given(request).response_ids[:-1].tolist() if p and request.prompt.target else []
        return demonstrations.uft_hint(ids, p, segments=self.hint_segments, counters=(self.seed, "hint", rollout, uid))

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Clipped surrogate, and likelihood of the hint."""
        return demonstrations.uft(logp_NT, *mixed_inputs(batch), hint_coef=self.hint_coef, **self.clip.range)
