"""Learning from pairs: of two responses to one prompt, which one is better."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from rllava_pl.functional._numerics import raised


def dpo(
    chosen_logp_N: Tensor,
    rejected_logp_N: Tensor,
    ref_chosen_logp_N: Tensor,
    ref_rejected_logp_N: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation: ``-(1 - e) * log sigmoid(h) - e * log sigmoid(-h)``, one value a pair.

    ``h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))``, e the label smoothing. DPO (arXiv 2305.18290);
    e > 0 assumes that this share of the labels is flipped and gives the margin a finite optimum. The loss is ln 2 at
    h = 0 and grows linearly with a wrong margin, so no log-prob makes it overflow.

    Args:
        chosen_logp_N: (N,), log-prob of the better response: the sum over its tokens, not the mean.
        rejected_logp_N: (N,), of the worse one.
        ref_chosen_logp_N: (N,), of the better one under the reference.
        ref_rejected_logp_N: (N,), of the worse one under the reference.
        beta: Strength of the pull towards the reference; the smaller, the farther the policy moves.
        label_smoothing: Share of labels assumed wrong, in [0, 0.5].

    Returns:
        The loss and the implicit rewards ``beta * (chosen - ref_chosen)`` and ``beta * (rejected - ref_rejected)``,
        (N,) each and in at least fp32, the rewards detached.

    Raises:
        ValueError: ``beta`` not positive, ``label_smoothing`` outside of [0, 0.5], or inputs of unequal shapes.

    >>> import torch
    >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
    >>> dpo(chosen, rejected, reference, reference, beta=0.5)
    (tensor([0.3133]), tensor([0.5000]), tensor([-0.5000]))
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be a positive finite number, e.g. 0.1")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}; it must lie between 0 and 0.5, above it the rejected one would win"
        )
    logps = {"chosen": chosen_logp_N, "rejected": rejected_logp_N}
    logps |= {"ref_chosen": ref_chosen_logp_N, "ref_rejected": ref_rejected_logp_N}
    if len({x.shape for x in logps.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in logps.items())
        raise ValueError(f"log-probs have the shapes {shapes}; all four must be (N,), one sum a response")
    chosen_reward_N = beta * (raised(chosen_logp_N) - raised(ref_chosen_logp_N))
    rejected_reward_N = beta * (raised(rejected_logp_N) - raised(ref_rejected_logp_N))
    margin_N = chosen_reward_N - rejected_reward_N
    loss_N = -(1 - label_smoothing) * logsigmoid(margin_N) - label_smoothing * logsigmoid(-margin_N)
    return loss_N, chosen_reward_N.detach(), rejected_reward_N.detach()


def pair_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """Margin c - r of the implicit rewards, whether it is positive, and both rewards, (P,) each, by metric name."""
    margin_P = chosen_P - rejected_P
    accuracy_P = (margin_P > 0).float()
    return {"margin": margin_P, "pair_accuracy": accuracy_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
