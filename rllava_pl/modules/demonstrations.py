"""What algorithms that learn from given responses share: a response of the data set in the place of a sampled one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rllava_pl.loop.experience import interleaved
from rllava_pl.modules.base import RLModule
from rllava_pl.types import Experience, Request, Rollout

log = logging.getLogger(__name__)


@runtime_checkable
class HoldsResponses(Protocol):
    """Prompts that give the responses of their rows without opening images."""

    def responses(self, name: str) -> Iterator[tuple[str, str]]:
        """Place and text of each, by the name of the field."""


class DemonstrationModule(RLModule):
    """RL beside demonstrations: the ``target`` of a prompt, where it has one, tokenised and closed by the end token."""

    demonstrations_apart = True
    demonstration_metric = "demonstration_fraction"

    given_fields: ClassVar[tuple[str, ...]] = ("target",)
    """Columns of the data that hold responses."""
    needs_every_response: ClassVar[bool] = False
    """Whether a row without one is of no use."""

    def on_fit_start(self) -> None:
        """Look at the given responses of data sets from files, before a rollout stumbles over one.

        Raises:
            ValueError: A response is missing where each is needed, or does not fit the budget.
        """
        rows = getattr(getattr(self.trainer, "datamodule", None), "train_prompts", None)
        if not isinstance(rows, HoldsResponses):
            return
        for field in self.given_fields:
            texts = list(rows.responses(field))
            missing = [place for place, text in texts if not text]
            if missing and self.needs_every_response:
                raise ValueError(
                    f"{type(self).__name__} learns from the {field} of every row, and {len(missing)} of {len(texts)} "
                    f"have none, e.g. {missing[0]}; data.require_{field}: true leaves them out"
                )
            if len(missing) == len(texts):
                log.warning("no row has a %s: %s learns from rewards alone", field, type(self).__name__)
            for place, text in texts:
                if text:
                    self.encode_given(text, f"{field} of {place}")

    def encode_given(self, text: str, place: str) -> Tensor:
        """Token ids of a given response, closed by the end token.

        Raises:
            ValueError: The text is empty, does not fit the response budget, or contains tokens that no response may
                contain; names the place.
        """
        try:
            if not text:
                raise ValueError(f"it is empty, and {type(self).__name__} learns from nothing else")
            ids_T = self.policy.encode_response(text)
            if len(ids_T) > self.sampling.max_tokens:
                raise ValueError(
                    f"it has {len(ids_T)} tokens, sampling.max_tokens is {self.sampling.max_tokens}; raise it, or "
                    "leave such rows out by data.max_target_tokens and data.processor_path"
                )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return ids_T

    def given(self, request: Request, text: str, field: str = "target") -> Rollout:
        """``text`` as a response to the request, all of its tokens given by a demonstration.

        Args:
            request: What is answered.
            text: The prompt's ``field``.
            field: Named in errors.

        Raises:
            ValueError: As ``encode_given``.
        """
        prompt = request.prompt
        place = f" ({prompt.source})" if prompt.source else ""
        ids_T = self.encode_given(text, f"{field} of prompt {prompt.uid!r}{place}")
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
