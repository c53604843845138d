"""What options may be, each by itself (``options`` refuses contradictions), and what an algorithm may return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import NamedTuple

from torch import Tensor

from rllava_pl.functional._numerics import check_choice


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``."""

    low: float = 0.0
    high: float = inf
    without_low: bool = False
    """Whether ``low`` itself is too little."""
    without_high: bool = False
    """Whether ``high`` itself is too much."""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        enough = self.low < value if self.without_low else self.low <= value
        return enough and (value < self.high if self.without_high else value <= self.high)  # NaN is in no range

    def __str__(self) -> str:
        low = f"{'larger than' if self.without_low else 'at least'} {self.low:g}"
        return low if self.high == inf else f"{low} and {'below' if self.without_high else 'at most'} {self.high:g}"


NOT_NEGATIVE, POSITIVE, COUNT, PART = Range(), Range(without_low=True), Range(1), Range(0, 1)


def check_ranges(owner: str, options: Mapping[str, object], ranges: Mapping[str, Range]) -> None:
    """Refuse the first option that lies outside of its range; None, where an option is off, is in any.

    Raises:
        ValueError: Naming option, value and range.
    """
    for name, allowed in ranges.items():
        value = options.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{owner}: {name} is {value!r}; it must be {allowed}")


def check_choices(options: Mapping[str, object], choices: Mapping[str, Iterable[str]]) -> None:
    """Refuse the first option that is none of its choices.

    Raises:
        ValueError: Naming option, value and choices.
    """
    for name, allowed in choices.items():
        if name in options:
            check_choice(name, str(options[name]), allowed)


def credit_of_tokens(owner: object, advantages: Tensor, mask_NT: Tensor) -> Tensor:
    """Credit of samples (N,) given to each of their tokens, or that of tokens (N, T) as it is.

    Raises:
        ValueError: Another shape.
    """
    given = tuple(advantages.shape) if isinstance(advantages, Tensor) else None
    if given not in (mask_NT.shape[:1], mask_NT.shape):
        returned = "None" if given is None else f"shape {given}"
        raise ValueError(
            f"{type(owner).__name__}.advantages returned {returned}; it is one number a sample, "
            f"{tuple(mask_NT.shape[:1])}, or a token, {tuple(mask_NT.shape)}"
        )
    return advantages if advantages.ndim > 1 else advantages[:, None].expand(mask_NT.shape)


def loss_of_tokens(owner: object, loss_NT: Tensor, logp_NT: Tensor) -> Tensor:
    """The loss, unless it was reduced: a scalar would spread over the KL term, and depend on the micro-batches.

    Raises:
        ValueError: Another shape than that of the log-probs.
    """
    given = tuple(loss_NT.shape) if isinstance(loss_NT, Tensor) else None
    if given != logp_NT.shape:
        returned = "None" if given is None else f"shape {given}"
        raise ValueError(
            f"{type(owner).__name__}.policy_loss returned {returned}; it is the loss of every token, "
            f"{tuple(logp_NT.shape)}, which the loop reduces (option aggregation)"
        )
    return loss_NT
