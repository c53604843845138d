"""Any advantage with any loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from torch import Tensor

from rllava_pl.functional import advantages, losses
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch, TrainingBatch

AdvantageName = Literal["grpo", "rloo", "opo", "gpg", "pass_at_k", "reinforce_pp", "reinforce_pp_baseline"]
LossName = Literal["clipped", "gspo", "gmpo", "cispo", "sapo", "reinforce"]
Knobs = Mapping[str, float | bool | None]


class Recipe(RLModule):
    """A combination of your own from YAML: advantage, loss and aggregation by the names of their functions.

    ``advantage`` names a function of ``rllava_pl.functional.advantages``, ``loss`` one of
    ``rllava_pl.functional.losses``; their knobs have the functions' own defaults. Only "clipped" reads the option
    ``clip``: ranges of the other losses are of another size.

    Args:
        advantage: From rewards to credit.
        advantage_options: Knobs of that function.
        loss: From log-probs and credit to the loss of every token.
        loss_options: Knobs of that function, its clip range among them.
    """

    def __init__(
        self,
        *args,
        advantage: AdvantageName = "grpo",
        advantage_options: dict[str, float | bool | None] | None = None,
        loss: LossName = "clipped",
        loss_options: dict[str, float | bool | None] | None = None,
        **kwargs,
    ) -> None:
        self._advantage = _chosen("advantage", advantage, get_args(AdvantageName), advantages)
        self._loss = _chosen("loss", loss, get_args(LossName), losses)
        self.advantage, self.loss = advantage, loss
        self.advantage_options = _checked("advantage_options", self._advantage, advantage_options or {})
        self.loss_options = _checked("loss_options", self._loss, loss_options or {})
        super().__init__(*args, **kwargs)
        if loss == "clipped":
            self.loss_options = {**self.clip.range, "dual_clip": self.clip.dual, **self.loss_options}

    @property
    def needs_groups(self) -> bool:  # type: ignore[override]
        """Whether the advantage compares the completions of a prompt."""
        return "group_N" in inspect.signature(self._advantage).parameters

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """What the chosen function returns for the tensors of the batch that it names."""
        tensors = {"mask_NT": batch.sampled_mask_NT}
        inputs = [tensors[name] if name in tensors else getattr(batch, name) for name in _inputs(self._advantage)]
        credit = self._advantage(*inputs, **self.advantage_options)
        return credit[0] if isinstance(credit, tuple) else credit  # with returns beside the advantages

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """What the chosen function returns for log-probs and advantages."""
        given = {
            "logp": logp_NT,
            "old_logp": batch.old_logp_NT,
            "advantages": batch.advantages_NT,
            "mask": batch.trained_mask_NT,
        }
        loss_NT: Tensor = self._loss(*[given[name] for name in _inputs(self._loss)], **self.loss_options)
        return loss_NT


def _inputs(function: Callable[..., Tensor]) -> list[str]:
    """Names of the tensors a function takes; its knobs are keyword-only."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]


def _chosen(option: str, name: str, allowed: tuple[str, ...], module: object) -> Callable[..., Tensor]:
    if name not in allowed:
        raise ValueError(f"{option} is {name!r}; it must be one of {', '.join(allowed)}")
    function: Callable[..., Tensor] = getattr(module, name)
    return function


def _checked(option: str, function: Callable[..., Tensor], knobs: Knobs) -> dict[str, float | bool | None]:
    """The knobs, if the function has all of them and gets all that it needs."""
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if unknown := [name for name in knobs if name not in known]:
        raise ValueError(
            f"{option}: {function.__name__} has no knob {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    if missing := [name for name, knob in known.items() if knob.default is knob.empty and name not in knobs]:
        raise ValueError(f"{option}: {function.__name__} needs {', '.join(missing)}")
    return dict(knobs)
