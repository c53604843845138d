"""What is measured: of samples when they are judged, of tokens when they are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional.kl import kl_estimate
from rllava_pl.loop.lifecycle import Lifecycle
from rllava_pl.loop.optimization import Optimization
from rllava_pl.loop.shaping import truncated
from rllava_pl.types import Experience, PolicyOutput


class Observation(Optimization, Lifecycle):
    """The metrics of ``RLModule``; all are means over everything of a rollout, on all ranks."""

    def observe_engine(self) -> None:
        """How often the engine was asked again, where it ever is."""
        if self.engine.retries:
            faults = torch.tensor(self.engine.take_faults(), device=self.policy.device)
            self.tally.add_total("engine_faults", faults)

    def observe_samples(self, experience: Experience) -> None:
        """Statistics of what was sampled; silenced groups, demonstrations and rows beside a group count nowhere."""
        own_NT = experience.own_mask_NT
        counted_N = own_NT.any(1) & (experience.group_N >= 0)
        samples = {
            "reward": experience.rewards_N,
            **{f"reward/{name}": values_N for name, values_N in experience.components.items()},
            "response_tokens": own_NT.sum(1),
            "truncated_fraction": truncated(experience),
        }
        if self.group_size > 1:  # a completion without others to compare with says nothing about its prompt
            samples["informative_groups"] = self.collection.informative(experience)
        self.tally.add_all(samples, counted_N)
        self.tally.add_spread("reward_std", experience.rewards_N, counted_N)

    def observe_credit(self, experience: Experience) -> None:
        """How far advantages spread over the tokens that the policy sampled: 0 means that nothing is learnt."""
        if experience.advantages_NT is not None:
            self.tally.add_spread("advantage_std", experience.advantages_NT, experience.own_mask_NT)

    @torch.no_grad()
    def observe_tokens(self, output: PolicyOutput, batch: Experience, loss: Tensor, cut_NT: Tensor) -> None:
        """Statistics of one micro-batch in its update; ``cut_NT``: where the loss has cut the gradient off."""
        logp_NT, own_NT, tally = output.logp_NT, batch.own_mask_NT, self.tally
        tally.add("loss", loss, 0)  # a sum over micro-batches and ranks; counted once an optimizer step
        tokens = {"entropy": output.entropy_NT}
        if batch.advantages_NT is not None:
            tokens["clip_fraction"] = cut_NT
            tokens["clip_fraction/high"] = cut_NT & (batch.advantages_NT > 0)
            tokens["clip_fraction/low"] = cut_NT & (batch.advantages_NT < 0)
        if batch.ref_logp_NT is not None:
            tokens["kl"] = kl_estimate(logp_NT, batch.ref_logp_NT, "k3")
        if self.first_update:  # the policy still is the one that sampled: what differs is the engine's arithmetic
            tokens["engine_mismatch_kl"] = kl_estimate(batch.engine_logp_NT, logp_NT, "k3")
            if not self.engine.exact:
                tokens["engine_gap_mean"] = gap_NT = (batch.engine_logp_NT - logp_NT).abs()
                tally.add_largest("engine_gap_max", gap_NT, own_NT)
        tally.add_all(tokens, own_NT)
        if batch.old_logp_NT is not None:
            ratio_NT = (logp_NT - batch.old_logp_NT).clamp(-20, 20).exp()
            tally.add_effective_size("effective_sample_size", ratio_NT, own_NT)

    def publish_metrics(self) -> None:
        """Metrics to loggers, advice to the log; the next rollout begins from nothing. Collective."""
        metrics = {f"train/{name}": value for name, value in self.tally.means().items()}
        metrics |= {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        self.report_incidents(metrics)
        self.publish(metrics)
        self.diagnosis.look(metrics)
        self.tally.clear()
        self.seconds.clear()
        self.check_rewards(metrics)

    @property
    def first_update(self) -> bool:
        """True until the first optimizer step on the present rollout batch."""
        return self.weight_version == self.rollout_version
