"""GRPO done right: without its two biases."""

from __future__ import annotations

from rllava_pl.functional.reduce import ReduceMode
from rllava_pl.loop.options import KL
from rllava_pl.modules.grpo import GRPO


class DrGRPO(GRPO):
    """Dr. GRPO (arXiv 2503.20783): GRPO without the division by the std and without the division by the length.

    A_i = r_i - mean(r); loss = -min(A·ρ, A·clip(ρ, 1-ε, 1+ε)), summed over tokens and divided by N·max_tokens, a
    constant. Dividing by the std favours prompts that are almost solved or almost hopeless; dividing by each response's
    length makes long wrong answers cheap.

    Args:
        scale_by_std: Paper: no.
        aggregation: Paper: the sum over tokens, divided by a constant.
        kl: Paper: no KL term.
    """

    def __init__(
        self,
        *args,
        scale_by_std: bool = False,
        aggregation: ReduceMode = "constant",
        kl: KL = KL(),
        **kwargs,
    ) -> None:
        super().__init__(*args, scale_by_std=scale_by_std, aggregation=aggregation, kl=kl, **kwargs)
