"""From rewards to advantages: how much better a sample was than the policy usually is on that prompt.

Every function takes the rollout batch gathered from all ranks. Statistics are taken in fp64: in fp32, fifteen equal
rewards of 0.98 would get an advantage of 0.19 instead of 0. A group of one and a group of equal rewards carry no
information and get exactly 0.

One advantage a sample: :func:`grpo`, :func:`rloo`, :func:`opo`, :func:`gpg`, :func:`pass_at_k`, :func:`remax`.
One a token: :func:`reinforce_pp`, :func:`reinforce_pp_baseline`, :func:`gae`.

============== =====================================================================================================
``rewards_N``  one reward a sample
``group_N``    int64; equal for samples of one prompt instance. Ids are arbitrary, groups may be unequal
returned       (N,), in at least fp32
raised         ValueError: inputs that are not vectors of one length, an option out of its range
============== =====================================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from rllava_pl.functional._groups import Groups
from rllava_pl.functional._numerics import raised
from rllava_pl.functional._returns import gae, reinforce_pp, reinforce_pp_baseline

__all__ = ["gae", "gpg", "grpo", "opo", "pass_at_k", "reinforce_pp", "reinforce_pp_baseline", "remax", "rloo"]


def grpo(rewards_N: Tensor, group_N: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages: ``(r - mean_g) / (std_g + eps)``, std unbiased (n - 1).

    GRPO (arXiv 2402.03300); without the division Dr. GRPO (arXiv 2503.20783), which does not favour groups with
    almost equal rewards.

    Options:
        scale_by_std: Divide by the standard deviation of the group.
        eps: Added to the standard deviation.

    >>> grpo(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([7, 7, 7, 7]), scale_by_std=False)
    tensor([-0.2500, -0.2500, -0.2500,  0.7500])
    """
    groups = Groups.of(group_N, rewards_N)
    advantages_N = groups.centered(rewards_N)
    if scale_by_std:
        advantages_N = advantages_N / (groups.std(advantages_N) + eps)
    return advantages_N.to(raised(rewards_N).dtype)


def rloo(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Leave-one-out advantages: reward minus the mean of the group's other samples, ``n / (n - 1) * (r - mean_g)``.

    RLOO (arXiv 2402.14740); n is the size of the group. The baseline leaves the sample itself out, so it does not bias
    the gradient.

    >>> rloo(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 0]))
    tensor([ 0.7500, -0.7500,  0.0000])
    """
    groups = Groups.of(group_N, rewards_N)
    size_N = groups.size_N.to(torch.float64)
    return (groups.centered(rewards_N) * size_N / (size_N - 1).clamp(min=1)).to(raised(rewards_N).dtype)


def opo(rewards_N: Tensor, group_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Reward minus the length-weighted mean of the group: ``r - sum_g(l * r) / sum_g(l)``.

    OPO (arXiv 2505.23585): the baseline of least gradient variance if the squared norm of a response's gradient grows
    with its length. It presumes sums over tokens and one optimizer step a rollout batch.

    ``lengths_N``, int64, are the trainable tokens of each sample; a group without any uses its plain mean.

    >>> opo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([5, 3]))
    tensor([ 0.3750, -0.6250])
    """
    groups = Groups.of(group_N, rewards_N)
    if lengths_N.shape != rewards_N.shape:
        raise ValueError(
            f"lengths_N has shape {tuple(lengths_N.shape)}, the rewards have {tuple(rewards_N.shape)}; "
            "both must be (N,), one entry a sample"
        )
    if (lengths_N < 0).any():
        raise ValueError(f"lengths_N holds {lengths_N.min()}; a length counts trainable tokens and is 0 or more")
    # The weighted mean of what is left after the plain mean: equal rewards then stay exactly 0.
    centered_N = groups.centered(rewards_N)
    shift_N = groups.sum(lengths_N * centered_N) / groups.sum(lengths_N).clamp(min=1)
    return (centered_N - shift_N).to(raised(rewards_N).dtype)


def gpg(rewards_N: Tensor, group_N: Tensor, *, f_norm: float = 1.0) -> Tensor:
    """Centred rewards, rescaled for the uninformative groups: ``alpha * (r - mean_g) / f_norm``.

    GPG (arXiv 2504.02546). ``alpha = N / (samples in groups with unequal rewards)`` corrects for the zeros that groups
    of equal rewards add to the mean over the batch. Groups count by their spread, so a bonus for every sample leaves
    alpha unchanged.

    Options:
        f_norm: Constant that the rewards are divided by.

    >>> gpg(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 1., -1.,  0.,  0.])
    """
    if not f_norm > 0:
        raise ValueError(f"f_norm is {f_norm}; rewards are divided by it, it must be positive")
    groups = Groups.of(group_N, rewards_N)
    informative = groups.unequal(raised(rewards_N)).sum().clamp(min=1).double()
    return (groups.centered(rewards_N) * (len(rewards_N) / informative) / f_norm).to(raised(rewards_N).dtype)


def pass_at_k(rewards_N: Tensor, group_N: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Credit for the best sample of a group only, by its lead: ``(r_best - r_second) / (std_g + eps)``.

    The gain of the group's maximum over its maximum without the sample (arXiv 2503.19595, there without the division),
    which trains pass@k, k = size of the group. The std is unbiased (n - 1). A tie at the top gives 0 to all.

    Options:
        scale_by_std: Divide by the standard deviation of the group.
        eps: Added to the standard deviation.

    >>> pass_at_k(torch.tensor([0.2, 1.0, 0.5]), torch.tensor([0, 0, 0]), scale_by_std=False)
    tensor([0.0000, 0.5000, 0.0000])
    """
    groups = Groups.of(group_N, rewards_N)
    values_N = rewards_N.double()
    lead_N = (values_N - groups.max_of_others(values_N)).clamp(min=0).masked_fill(groups.size_N == 1, 0.0)
    if scale_by_std:
        lead_N = lead_N / (groups.std(groups.centered(rewards_N)) + eps)
    return lead_N.to(raised(rewards_N).dtype)


def remax(rewards_N: Tensor, greedy_rewards_N: Tensor) -> Tensor:
    """Reward minus the reward of the greedy response to the same prompt: ``r - r_greedy``.

    ReMax (arXiv 2310.10505). The greedy response gets the same penalties and KL as the samples, and is not trained.

    ``greedy_rewards_N`` repeats the reward of a prompt's greedy response for each of its samples.

    >>> remax(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25]))
    tensor([ 0.7500, -0.2500])
    """
    if rewards_N.ndim != 1 or greedy_rewards_N.shape != rewards_N.shape:
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)}, greedy_rewards_N {tuple(greedy_rewards_N.shape)}; "
            "both must be (N,), one entry a sample"
        )
    return raised(rewards_N) - raised(greedy_rewards_N)
