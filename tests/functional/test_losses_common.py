"""What holds for all losses: gradients, equality on-policy, and indifference to what must not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rllava_pl.functional import losses
from rllava_pl.functional.reduce import reduce_loss
from tests.functional.cases import Case, cases, generator, masks

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def picked(old: Tensor) -> Tensor:
    """A fifth of the tokens, by the digits of their old log-prob: it moves with them when they are rearranged."""
    return (1000 * old.double()).floor().remainder(5) == 0


# every loss as a function of (logp, old_logp, advantages, mask)
LOSSES: dict[str, Loss] = {
    "reinforce": lambda logp, old, credit, mask: losses.reinforce(logp, credit),
    "clipped": lambda logp, old, credit, mask: losses.clipped(logp, old, credit),
    "dual clip": lambda logp, old, credit, mask: losses.clipped(logp, old, credit, clip_high=0.28, dual_clip=3.0),
    "cispo": lambda logp, old, credit, mask: losses.cispo(logp, old, credit, clip_low=1.0, clip_high=4.0),
    "sapo": lambda logp, old, credit, mask: losses.sapo(logp, old, credit),
    "gspo": losses.gspo,
    "gmpo": losses.gmpo,
    "clip_cov": lambda logp, old, credit, mask: losses.clip_cov(logp, old, credit, mask, selected_NT=picked(old)),
    "kl_cov": lambda logp, old, credit, mask: losses.kl_cov(logp, old, credit, mask, selected_NT=picked(old)),
    "value_clipped": lambda logp, old, credit, mask: losses.value_clipped(logp, old, credit),
}
MASKED = ["gspo", "gmpo", "clip_cov", "kl_cov"]
TOKENWISE = sorted(set(LOSSES) - set(MASKED))
ON_POLICY = ["clipped", "dual clip", "cispo", "sapo", "gspo", "gmpo", "clip_cov", "kl_cov"]
MODES = ["token-mean", "sequence-mean-token-mean"]


def gradient(loss: Loss, case: Case, mode: str = "token-mean") -> Tensor:
    logp = case.logp.clone().requires_grad_()
    value = reduce_loss(loss(logp, *case[1:]), case.mask, mode)
    return torch.autograd.grad(value, logp)[0]


def frozen_cispo(logp: Tensor, case: Case) -> Tensor:
    """CISPO with the part that carries no gradient as a constant."""
    return -(case.logp - case.other).exp().clamp(0, 5) * case.advantages * logp


def frozen_gspo(logp: Tensor, case: Case) -> Tensor:
    """GSPO likewise: the sequence ratio is a constant, times exp(logp - constant)."""
    count = case.mask.sum(1, keepdim=True).clamp(min=1)
    log_s = ((case.logp - case.other) * case.mask).sum(1, keepdim=True) / count
    ratio = (log_s + logp - case.logp).exp()
    plain, bounded = -case.advantages * ratio, -case.advantages * ratio.clamp(1 - 3e-4, 1 + 4e-4)
    return torch.maximum(plain, bounded) * case.mask


FROZEN = {"cispo": frozen_cispo, "gspo": frozen_gspo}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_finite_differences(name, seed):
    rng = generator(seed)
    # off every kink: ratios 0.8, 1.2, 1.28, 2, 3, log-ratios 0 and 0.4, values 0.5 from the old ones
    x = torch.tensor([-0.9, -0.3, -0.1, 0.13, 0.3, 0.6, 1.3], dtype=torch.float64)
    x = x[torch.randint(len(x), (4, 6), generator=rng)]
    logp, credit = torch.randn(2, 4, 6, generator=rng, dtype=torch.float64).unbind(0)
    case = Case(logp, logp - x, credit, masks((4, 6), rng))
    leaf, weights = logp.clone().requires_grad_(), torch.randn(4, 6, generator=rng, dtype=torch.float64)
    actual = torch.autograd.grad((LOSSES[name](leaf, *case[1:]) * weights).sum(), leaf)[0]
    with torch.no_grad():
        numeric = torch.zeros_like(logp)
        for place in range(logp.numel()):
            step = torch.zeros(logp.numel(), dtype=torch.float64)
            step[place] = 1e-6
            step = step.view_as(logp)
            values = [
                FROZEN[name](at, case) if name in FROZEN else LOSSES[name](at, *case[1:])
                for at in (logp + step, logp - step)
            ]
            numeric.view(-1)[place] = ((values[0] - values[1]) * weights).sum() / 2e-6
    torch.testing.assert_close(actual, numeric, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name, mode):
    for case in list(cases(torch.float64, seed=50))[::2]:
        row_constant = case.advantages[:, :1].expand_as(case.logp)
        same = case._replace(other=case.logp, advantages=row_constant)
        expected = gradient(LOSSES["reinforce"], same, mode)
        if name == "clip_cov":
            expected = expected.masked_fill(picked(case.logp), 0.0)
        torch.testing.assert_close(gradient(LOSSES[name], same, mode), expected, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_ratios_and_empty_rows_give_finite_numbers(name):
    for case in list(cases(torch.float32, seed=51))[::2]:
        logp = case.logp.clone().requires_grad_()
        loss = LOSSES[name](logp, *case[1:])
        slope = torch.autograd.grad(reduce_loss(loss, case.mask, "token-mean"), logp)[0]
        assert loss.isfinite().all()
        assert slope.isfinite().all()
        assert (slope.masked_select(~case.mask) == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_batch_without_trainable_tokens_stays_connected(name):
    logp = torch.randn(3, 4, generator=generator(52), requires_grad=True)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    loss = reduce_loss(LOSSES[name](logp, torch.zeros(3, 4), torch.ones(3, 4), nothing), nothing, "token-mean")
    loss.backward()
    assert loss == 0
    assert (logp.grad == 0).all()


@pytest.mark.parametrize("name", MASKED)
def test_masked_positions_have_no_influence(name):
    for case in list(cases(torch.float64, seed=53))[::4]:
        logp = case.logp.clone().requires_grad_()
        expected = LOSSES[name](logp, *case[1:])
        expected_gradient = torch.autograd.grad(expected.sum(), logp)[0]
        assert (expected.masked_select(~case.mask) == 0).all()
        for scale in (-3.0, 1e30):
            garbage = [torch.where(case.mask, x, scale * x.sign()) for x in case[:3]]
            garbage[0].requires_grad_()
            actual = LOSSES[name](*garbage, case.mask)
            torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-14)
            actual_gradient = torch.autograd.grad(actual.sum(), garbage[0])[0]
            torch.testing.assert_close(actual_gradient, expected_gradient, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_order_of_samples_have_no_influence(name):
    for case in list(cases(torch.float64, seed=54))[::5]:
        expected = LOSSES[name](*case)
        order = torch.randperm(len(case.logp), generator=generator(0))
        shuffled = LOSSES[name](*(x[order] for x in case))
        torch.testing.assert_close(shuffled, expected[order], atol=1e-14, rtol=1e-14)

        wide = [torch.cat([x, torch.full_like(x, -3)], 1) for x in case[:3]]
        wide_mask = torch.cat([case.mask, torch.zeros_like(case.mask)], 1)
        padded = LOSSES[name](*wide, wide_mask)
        torch.testing.assert_close(padded[:, : case.logp.shape[1]], expected, atol=1e-14, rtol=1e-14)
        assert name in TOKENWISE or (padded[:, case.logp.shape[1] :] == 0).all()


@pytest.mark.parametrize("name", TOKENWISE)
def test_losses_without_a_mask_are_elementwise(name):
    case = list(cases(torch.float64, seed=55))[-1]
    expected = LOSSES[name](*case)
    order = torch.randperm(case.logp.numel(), generator=generator(1))
    shuffled = LOSSES[name](*(x.flatten()[order] for x in case))
    torch.testing.assert_close(shuffled, expected.flatten()[order], rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_are_unchanged(name):
    for case in list(cases(torch.float32, seed=56))[::50]:
        before = [x.clone() for x in case]
        LOSSES[name](*case)
        assert all(torch.equal(x, y) for x, y in zip(case, before, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_raised(name, half):
    for case in list(cases(half, seed=57))[::50]:
        raised = [x.float() for x in case[:3]]
        actual = LOSSES[name](*case)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, LOSSES[name](*raised, case.mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted({*ON_POLICY, "reinforce"}))
def test_raising_a_good_token_lowers_the_loss(name):
    mask = torch.ones(1, 3, dtype=torch.bool)
    logp = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    for advantage in (1.0, -1.0):
        case = Case(logp, logp, torch.full_like(logp, advantage), mask)
        slope = gradient(LOSSES[name], case)
        spared = picked(logp) if name == "clip_cov" else ~mask
        assert (slope.masked_select(~spared) * advantage < 0).all()


@pytest.mark.parametrize("name", MASKED)
def test_wrong_mask_is_refused_by_name(name):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^mask has dtype torch.float32; it must be torch.bool"):
        LOSSES[name](x, x, x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^mask has shape \(1, 3\), the values have \(2, 3\); they must be equal$"):
        LOSSES[name](x, x, x, torch.ones(1, 3, dtype=torch.bool))
