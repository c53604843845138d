"""Responses that the data give: tokenised, checked before training begins, and turned into rollouts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from rllava_pl.models.policy import Policy
from rllava_pl.types import Request, Rollout, Segment

log = logging.getLogger(__name__)


@runtime_checkable
class HoldsResponses(Protocol):
    """Prompts that give the responses of their rows without opening images."""

    def responses(self, name: str) -> Iterator[tuple[str, str]]:
        """Place and text of each, by the name of the field."""


def encode_given(policy: Policy, text: str, place: str, max_tokens: int) -> Tensor:
    """Token ids (T,) of a given response, closed by the end token.

    Raises:
        ValueError: The text is empty, does not fit the response budget, or contains tokens that no response may
            contain; names the place.
    """
    try:
        if not text:
            raise ValueError("it is empty, so there is nothing to train on")
        ids_T = policy.encode_response(text)
        if len(ids_T) > max_tokens:
            raise ValueError(
                f"it has {len(ids_T)} tokens, sampling.max_tokens is {max_tokens}; raise it, or leave such rows out "
                "by data.max_target_tokens and data.processor_path"
            )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return ids_T


def given_rollout(
    policy: Policy, request: Request, field: str, max_tokens: int, *, in_baseline: bool = True
) -> Rollout:
    """The prompt's ``field`` as a response to the request, all of its tokens given; errors as of ``encode_given``."""
    prompt = request.prompt
    place = f"{field} of prompt {prompt.uid!r}" + (f" ({prompt.source})" if prompt.source else "")
    ids_T = encode_given(policy, getattr(prompt, field), place, max_tokens)
    return Rollout(
        prompt=prompt,
        group=request.group,
        inputs=request.inputs,
        segments=(Segment(ids_T, "given"),),
        text=policy.decode(ids_T),
        in_baseline=in_baseline,
    )


def check_given_responses(
    rows: object, fields: Sequence[str], policy: Policy, max_tokens: int, *, owner: str, required: bool
) -> None:
    """Tokenise the given responses of data from files (``HoldsResponses``) before the first rollout needs one.

    Raises:
        ValueError: A response is missing where each is required, or does not fit the budget.
    """
    if not isinstance(rows, HoldsResponses):
        return
    for field in fields:
        texts = list(rows.responses(field))
        missing = [place for place, text in texts if not text]
        if missing and required:
            raise ValueError(
                f"{owner} learns from the {field} of every row, and {len(missing)} of {len(texts)} have none, e.g. "
                f"{missing[0]}; data.require_{field}: true leaves them out"
            )
        if len(missing) == len(texts):
            log.warning("no row has a %s: %s learns from rewards alone", field, owner)
        for place, text in texts:
            if text:
                encode_given(policy, text, f"{field} of {place}", max_tokens)
