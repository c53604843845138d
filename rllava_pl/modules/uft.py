"""UFT: unified fine-tuning with hints."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rllava_pl.functional import demonstrations
from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.functional.seeds import seed_from, uniforms
from rllava_pl.loop.given_responses import given_rollout
from rllava_pl.loop.options import KL
from rllava_pl.modules.demonstrations import DemonstrationModule
from rllava_pl.modules.grpo import GRPO
from rllava_pl.types import PromptBatch, Request, Rollout, TrainingBatch


class UFT(DemonstrationModule, GRPO):
    """UFT (arXiv 2505.16984): answers begin with a part of the demonstration, which grows shorter.

    The hint is the first l of L segments, l ~ Binomial(L, p), where p falls by a cosine from 0.95 to 0.05 over
    ``hint_steps`` rollouts and is 0 from then on; one draw a prompt, shared by its group. Sampled tokens: GRPO. Hint
    tokens: -β·log π, mean over theirs. ``train/hint_fraction`` is above 0 before ``hint_steps`` and 0 after.

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
        hinted = [dataclasses.replace(request, prefix_ids=self.hint(request)) for request in requests]
        return self.engine.generate(hinted, self.sampling)

    def hint(self, request: Request) -> tuple[int, ...]:
        """The first l segments of the target, without its end token; none where there is no target."""
        p = demonstrations.uft_hint_probability(self.state.rollouts, hint_steps=self.hint_steps)
        if not request.prompt.target or p == 0:
            return ()
        ids = given_rollout(self.policy, request, "target", self.sampling.max_tokens).response_ids[:-1].tolist()
        segments = min(self.hint_segments, len(ids))
        counters = (self.seed, "hint", self.state.rollouts, request.prompt.uid)
        draws = uniforms(torch.tensor([seed_from(*counters, k) for k in range(segments)]), 0)
        return tuple(ids[: round(len(ids) * int((draws < p).sum()) / segments)])

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """Clipped surrogate, and likelihood of the hint."""
        return demonstrations.uft(
            logp_NT,
            batch.old_logp_NT,
            batch.advantages_NT,
            batch.trained_mask_NT,
            batch.given_mask_NT,
            hint_coef=self.hint_coef,
            **self.clip.range,
        )
