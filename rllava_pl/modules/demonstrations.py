"""What algorithms that learn from given responses share: a response of the data set in the place of a sampled one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice

import torch

from rllava_pl.modules.base import RLModule
from rllava_pl.modules.loop.experience import interleaved
from rllava_pl.types import Experience, Request, Rollout


class DemonstrationModule(RLModule):
    """RL beside demonstrations: the ``target`` of a prompt, where it has one, tokenised and closed by the end token."""

    demonstrations_apart = True
    demonstration_metric = "demonstration_fraction"

    def given(self, request: Request, text: str, field: str = "target") -> Rollout:
        """``text`` as a response to the request, all of its tokens given by a demonstration.

        Args:
            request: What is answered.
            text: The prompt's ``field``.
            field: Named in errors.

        Raises:
            ValueError: The text is empty, does not fit the response budget, or contains tokens that no response may
                contain.
        """
        prompt = request.prompt
        try:
            if not text:
                raise ValueError(f"it is empty, and {type(self).__name__} learns from nothing else")
            ids_T = self.policy.encode_response(text)
            if len(ids_T) > self.sampling.max_tokens:
                raise ValueError(f"it has {len(ids_T)} tokens, sampling.max_tokens is {self.sampling.max_tokens}")
        except ValueError as error:
            place = f" ({prompt.source})" if prompt.source else ""
            raise ValueError(f"{field} of prompt {prompt.uid!r}{place}: {error}") from error
        every_T = torch.ones_like(ids_T, dtype=torch.bool)
        return Rollout(
            prompt=prompt,
            group=request.group,
            prompt_ids=request.inputs.input_ids_S,
            inputs=request.inputs,
            response_ids=ids_T,
            engine_logprobs=torch.zeros(len(ids_T), dtype=torch.float32),
            response_mask=every_T,
            finish_reason="stop",
            weight_version=self.weight_version,
            text=self.policy.decode(ids_T),
            demo_mask=every_T,
        )

    def observe_samples(self, experience: Experience) -> None:
        """Also how many of the trained tokens demonstrations gave."""
        super().observe_samples(experience)
        self.tally.add_masked(self.demonstration_metric, experience.demo_mask_NT.float(), experience.mask_NT)


class MixedGroupModule(DemonstrationModule):
    """The demonstration is one of the group: judged like the others, and part of the mean they are compared with."""

    needs_groups = True

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """``group_size`` - 1 samples and the demonstration of prompts that have one, ``group_size`` samples else."""
        asked = [dataclasses.replace(r, seeds=r.seeds[:-1]) if r.prompt.target else r for r in requests]
        sampled = iter(super().sample(asked))
        return [rollout for r in asked for rollout in (*islice(sampled, len(r.seeds)), *self._demonstrations(r))]

    def _demonstrations(self, request: Request) -> Iterable[Rollout]:
        return [self.given(request, request.prompt.target)] if request.prompt.target else []


class BesideGroupModule(DemonstrationModule):
    """The demonstration stands beside the group: trained on, but not part of the mean.

    It is one more row, a group of its own. A prompt without demonstration repeats its first sample there, silenced.
    """

    needs_groups = True
    extra_members = 1

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """``group_size`` samples, then the demonstration or a silent row."""
        sampled = super().sample(requests)
        beside = [self._beside(r, sampled[p * self.group_size]) for p, r in enumerate(requests)]
        return interleaved(sampled, beside, self.group_size)

    def _beside(self, request: Request, sample: Rollout) -> Rollout:
        alone = dataclasses.replace(request, group=~request.group)
        if request.prompt.target:
            return self.given(alone, request.prompt.target)
        silence = torch.zeros_like(sample.response_mask)
        return dataclasses.replace(sample, group=alone.group, response_mask=silence)
