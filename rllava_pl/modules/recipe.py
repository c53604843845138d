"""Any advantage with any loss."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from rllava_pl.functional import advantages, losses
from rllava_pl.loop.named_functions import check_function_options, choose, tensor_inputs
from rllava_pl.modules.base import RLModule
from rllava_pl.types import RewardedBatch, TrainingBatch

AdvantageName = Literal["grpo", "rloo", "opo", "gpg", "pass_at_k", "reinforce_pp", "reinforce_pp_baseline"]
LossName = Literal["clipped", "gspo", "gmpo", "cispo", "sapo", "reinforce"]


class Recipe(RLModule):
    """A combination of an advantage, a loss and an aggregation from YAML, by the names of their functions.

    ``advantage`` names a function of ``rllava_pl.functional.advantages``, ``loss`` one of
    ``rllava_pl.functional.losses``; their options have the functions' own defaults. Only "clipped" reads the option
    ``clip``: ranges of the other losses are of another size.

    Args:
        advantage: From rewards to advantages.
        advantage_options: Options of that function.
        loss: From log-probs and advantages to the loss of every token.
        loss_options: Options of that function, its clip range among them.
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
        self.advantage, self.loss = advantage, loss
        self._advantage = choose("advantage", advantage, get_args(AdvantageName), advantages)
        self._loss = choose("loss", loss, get_args(LossName), losses)
        self.advantage_options = check_function_options("advantage_options", self._advantage, advantage_options)
        self.loss_options = check_function_options("loss_options", self._loss, loss_options)
        super().__init__(*args, **kwargs)
        if loss == "clipped":
            clip = {"clip_low": self.clip.low, "clip_high": self.clip.high, "dual_clip": self.clip.dual}
            self.loss_options = clip | self.loss_options

    @property
    def needs_groups(self) -> bool:  # type: ignore[override]
        """Whether the advantage compares the completions of a prompt."""
        return "group_N" in tensor_inputs(self._advantage)

    def advantages(self, batch: RewardedBatch) -> Tensor:
        """What the chosen function returns for the tensors of the batch that it names."""
        sources = {"mask_NT": "sampled_mask_NT"}
        tensors = [getattr(batch, sources.get(name, name)) for name in tensor_inputs(self._advantage)]
        credit = self._advantage(*tensors, **self.advantage_options)
        return credit[0] if isinstance(credit, tuple) else credit  # with returns beside the advantages

    def policy_loss(self, logp_NT: Tensor, batch: TrainingBatch) -> Tensor:
        """What the chosen function returns for log-probs and advantages."""
        old_logp_NT, advantages_NT = batch.old_logp_NT, batch.advantages_NT
        tensors = {"logp": logp_NT, "old_logp": old_logp_NT, "advantages": advantages_NT, "mask": batch.trained_mask_NT}
        return self._loss(*[tensors[name] for name in tensor_inputs(self._loss)], **self.loss_options)
