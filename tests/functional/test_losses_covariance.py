"""Losses that treat tokens of high covariance apart, and the choice of those tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rllava_pl.functional.losses import clip_cov, clip_cov_select, clipped, kl_cov, kl_cov_select
from tests.functional.cases import RATIO_RTOL, assert_near, cases, generator, masks, matrix, rows, slow_ratio

DTYPES = [torch.float32, torch.float64]
# mean logp -2, mean A 0: covariances 3 * 1 = 3, -1 * -1 = 1, 0 and 0
LOGP = torch.tensor([[-1.0, -3.0, -2.0, -2.0]])
OLD_LOGP = torch.tensor([[-1.5, -3.0, -2.0, -2.0]])
ADVANTAGES = torch.tensor([[3.0, -1.0, 0.0, -2.0]])
EVERY_TOKEN = torch.ones(1, 4, dtype=torch.bool)


def slow_covariance(logp: Tensor, credit: Tensor, mask: Tensor) -> dict[tuple[int, int], float]:
    """Covariance of every trainable token, by row and column."""
    logps, credits, kept = logp.tolist(), credit.tolist(), mask.nonzero().tolist()
    mean_logp = sum(logps[i][t] for i, t in kept) / max(len(kept), 1)
    mean_credit = sum(credits[i][t] for i, t in kept) / max(len(kept), 1)
    return {(i, t): (credits[i][t] - mean_credit) * (logps[i][t] - mean_logp) for i, t in kept}


def slow_eligible(
    logp: Tensor, old: Tensor, credit: Tensor, mask: Tensor, low: float, high: float, lower: float, upper: float
) -> set[tuple[int, int]]:
    chosen = set()
    for (i, t), covariance in slow_covariance(logp, credit, mask).items():
        ratio, advantage = slow_ratio(logp[i, t].item() - old[i, t].item()), credit[i, t].item()
        is_clipped = -advantage * min(max(ratio, 1 - low), 1 + high) > -advantage * ratio
        if lower < covariance < upper and not is_clipped:
            chosen.add((i, t))
    return chosen


def slow_largest(covariance: dict[tuple[int, int], float], count: int) -> set[tuple[int, int]]:
    return set(sorted(covariance, key=lambda place: -covariance[place])[:count])


def places(selected: Tensor) -> set[tuple[int, int]]:
    return {(i, t) for i, t in selected.nonzero().tolist()}


def slow_budget(ratio: float, mask: Tensor) -> int:
    return max(1, int(ratio * sum(sum(row) for row in mask.tolist())))


def test_kl_cov_of_known_tokens():
    # one token of four, the first: -3 * e^0.5 + |0.5| = -4.446164; the others -A * 1
    loss = kl_cov(LOGP, OLD_LOGP, ADVANTAGES, EVERY_TOKEN, ratio=0.25)
    torch.testing.assert_close(loss, torch.tensor([[-4.446164, 1.0, 0.0, 2.0]]), atol=1e-6, rtol=0)


def test_clip_cov_of_known_tokens():
    # with lower = 0.5 the first two can be drawn, and both are; ratio 1 elsewhere
    loss = clip_cov(LOGP, OLD_LOGP, ADVANTAGES, EVERY_TOKEN, ratio=0.5, lower=0.5)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0.0, 0.0, 2.0]]), atol=1e-6, rtol=0)
    # bounds are exclusive: cov 1 is not above 1, cov 3 not below 3
    assert places(clip_cov_select(LOGP, OLD_LOGP, ADVANTAGES, EVERY_TOKEN, ratio=1.0)) == {(0, 0)}
    assert places(clip_cov_select(LOGP, OLD_LOGP, ADVANTAGES, EVERY_TOKEN, ratio=1.0, lower=0.5, upper=3.0)) == {(0, 1)}
    # the ratio e^0.5 of the first is beyond 1.2: clipped anyway, hence not drawn
    select = clip_cov_select(LOGP, OLD_LOGP, ADVANTAGES, EVERY_TOKEN, ratio=1.0, lower=0.5, clip_high=0.2)
    assert places(select) == {(0, 1)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_cov_selects_as_a_slow_loop(dtype):
    for logp, _, credit, mask in cases(dtype, seed=30):
        if mask.sum() == 2:
            continue  # of two tokens both have the same covariance
        for ratio in (0.002, 0.3, 1.0):
            expected = slow_largest(slow_covariance(logp, credit, mask), slow_budget(ratio, mask))
            assert places(kl_cov_select(logp, credit, mask, ratio=ratio)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high", "lower", "upper"), [(1.0, 1.0, 1.0, 5.0), (0.2, 0.2, 0.05, math.inf)])
def test_clip_cov_draws_among_the_tokens_of_a_slow_loop(low, high, lower, upper, dtype):
    rng, drawn = generator(31), 0
    for logp, old, credit, mask in cases(dtype, seed=31):
        eligible = slow_eligible(logp, old, credit, mask, low, high, lower, upper)
        options = {"clip_low": low, "clip_high": high, "lower": lower, "upper": upper, "generator": rng}
        assert places(clip_cov_select(logp, old, credit, mask, ratio=1.0, **options)) == eligible
        some = places(clip_cov_select(logp, old, credit, mask, ratio=0.2, **options))
        assert some <= eligible
        assert len(some) == min(slow_budget(0.2, mask), len(eligible))
        drawn += len(some)
    assert drawn > 500  # the cases do select something


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_equal_a_slow_loop(dtype):
    rng = generator(32)
    for logp, old, credit, mask in cases(dtype, seed=32):
        selected = masks(mask.shape, rng)  # any selection, masked tokens included
        clip, kl = [], []
        for p_row, o_row, a_row, kept, chosen in rows(logp, old, credit, mask, selected):
            tokens = list(zip(p_row, o_row, a_row, kept, chosen, strict=True))
            clip.append(
                [
                    max(-a * slow_ratio(p - o), -a * min(slow_ratio(p - o), 2.0)) if keep and not apart else 0.0
                    for p, o, a, keep, apart in tokens
                ]
            )
            kl.append(
                [
                    -a * slow_ratio(p - o) + (0.7 * abs(p - o) if apart else 0.0) if keep else 0.0
                    for p, o, a, keep, apart in tokens
                ]
            )
        actual_clip = clip_cov(logp, old, credit, mask, selected_NT=selected)
        actual_kl = kl_cov(logp, old, credit, mask, beta=0.7, selected_NT=selected)
        assert_near(actual_clip, matrix(clip, logp), dtype=dtype, rtol=RATIO_RTOL[dtype])
        assert_near(actual_kl, matrix(kl, logp), dtype=dtype, rtol=RATIO_RTOL[dtype])


def test_no_token_is_selected_without_eligible_ones():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, generator=generator(33))
    assert not kl_cov_select(x, x, nothing).any()
    assert not clip_cov_select(x, x, x, nothing).any()
    assert not clip_cov_select(x, x, torch.ones(2, 3), ~nothing).any()  # equal advantages: every covariance is 0
    assert kl_cov_select(torch.zeros(2, 3), x, ~nothing).sum() == 1  # equal log-probs: the first token
    assert kl_cov_select(torch.zeros(2, 3), x, ~nothing)[0, 0]


def test_number_of_selected_tokens_is_the_ratio_but_at_least_one():
    mask = torch.ones(10, 100, dtype=torch.bool)
    mask[:, 50:] = False
    logp, credit = torch.randn(2, 10, 100, generator=generator(34)).unbind(0)
    for ratio, count in [(0.0, 1), (1e-4, 1), (0.0059, 2), (0.1, 50), (1.0, 500)]:
        assert kl_cov_select(logp, credit, mask, ratio=ratio).sum() == count
        drawn = clip_cov_select(logp, logp, credit, mask, ratio=ratio, lower=-math.inf, upper=math.inf)
        assert drawn.sum() == count


def test_every_eligible_token_is_drawn_equally_often():
    logp, credit = torch.tensor([[-1.0, -3, -1, -3, -2]]), torch.tensor([[2.0, -2, 2, -2, 0]])  # cov 2, 2, 2, 2, 0
    rng = generator(35)
    mask = torch.ones(1, 5, dtype=torch.bool)
    draws = torch.cat([clip_cov_select(logp, logp, credit, mask, ratio=0.2, generator=rng) for _ in range(800)])
    counts = draws.sum(0).tolist()
    assert counts[4] == 0
    assert all(abs(count - 200) < 61 for count in counts[:4])  # 5 standard deviations of B(800, 1/4)


def test_selection_is_a_function_of_the_generator():
    logp, old, credit, mask = torch.randn(4, 20, 30, generator=generator(36)).unbind(0)
    mask = mask > -1

    def draw(seed: int) -> Tensor:
        return clip_cov_select(logp, old, credit, mask, ratio=0.02, generator=generator(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(2)
    assert torch.equal(torch.get_rng_state(), before)  # the global one is left alone


@pytest.mark.parametrize(
    "option", [{"clip_low": 0.1}, {"clip_high": 0.1}, {"ratio": 0.04}, {"lower": 0.5}, {"upper": 1.5}, {}]
)
def test_losses_without_a_selection_select_with_their_options(option):
    logp, old, credit, mask = torch.randn(4, 20, 30, generator=generator(41)).unbind(0)
    mask = mask > -1
    plain = clip_cov_select(logp, old, credit, mask, ratio=0.02, generator=generator(0))
    selected = clip_cov_select(logp, old, credit, mask, **{"ratio": 0.02, **option}, generator=generator(0))
    assert torch.equal(selected, plain) == (not option)  # the option matters
    actual = clip_cov(logp, old, credit, mask, **{"ratio": 0.02, **option}, generator=generator(0))
    clip = {name: value for name, value in option.items() if name.startswith("clip")}
    expected = clip_cov(logp, old, credit, mask, **clip, selected_NT=selected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_selection_ignores_padding_and_garbage():
    for logp, old, credit, mask in list(cases(torch.float64, seed=37))[::10]:
        if mask.sum() == 2:
            continue  # of two tokens both have the same covariance
        loud = [torch.where(mask, x, 1e6 * x - 7) for x in (logp, old, credit)]
        wide = [torch.cat([x, x], 1) for x in loud]
        wide_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
        options = {"lower": 0.1, "ratio": 0.3}
        expected = clip_cov_select(logp, old, credit, mask, generator=generator(1), **options)
        actual = clip_cov_select(*wide, wide_mask, generator=generator(1), **options)
        assert places(actual) == places(expected)
        largest = kl_cov_select(logp, credit, mask, ratio=0.3)
        assert places(kl_cov_select(wide[0], wide[2], wide_mask, ratio=0.3)) == places(largest)
        order = torch.randperm(len(logp), generator=generator(2))
        shuffled = kl_cov_select(logp[order], credit[order], mask[order], ratio=0.3)
        assert torch.equal(shuffled, largest[order])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_slices_of_one_selection_give_equal_losses_for_every_micro_batch(size):
    logp, old, credit, mask = torch.randn(4, 6, 8, generator=generator(38), dtype=torch.float64).unbind(0)
    mask = mask > -1
    excluded = clip_cov_select(old, old, credit, mask, ratio=0.1, lower=0.0, generator=generator(0))
    held = kl_cov_select(old, credit, mask, ratio=0.1)
    for loss, selected in ((clip_cov, excluded), (kl_cov, held)):
        assert 0 < selected.sum() < mask.sum()
        whole = loss(logp, old, credit, mask, selected_NT=selected)
        pieces = [
            loss(*(x[i : i + size] for x in (logp, old, credit, mask)), selected_NT=selected[i : i + size])
            for i in range(0, 6, size)
        ]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0)
        if size < 6:  # chosen within micro-batches it is not: other means, and a token from each at least
            alone = [loss(*(x[i : i + size] for x in (logp, old, credit, mask))) for i in range(0, 6, size)]
            assert not torch.equal(torch.cat(alone), whole)


def test_selected_tokens_have_no_gradient_and_others_that_of_clipped():
    logp, old, credit = torch.randn(3, 4, 6, generator=generator(39), dtype=torch.float64).unbind(0)
    logp.requires_grad_()
    mask, selected = masks((2, 4, 6), generator(40)).unbind(0)
    actual = torch.autograd.grad(clip_cov(logp, old, credit, mask, selected_NT=selected).sum(), logp)[0]
    expected = torch.autograd.grad(clipped(logp, old, credit, clip_low=1.0, clip_high=1.0).sum(), logp)[0]
    torch.testing.assert_close(actual, expected.masked_fill(selected | ~mask, 0.0), rtol=0, atol=0)


def test_penalty_pulls_towards_the_old_policy_at_any_log_ratio():
    logp = torch.tensor([[-1.0, -50.0, -2.0]], requires_grad=True)  # log-ratios 1, -48, 0
    old, everything = torch.tensor([[-2.0, -2.0, -2.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = kl_cov(logp, old, torch.zeros(1, 3), everything, beta=2.0, selected_NT=everything)
    torch.testing.assert_close(loss, torch.tensor([[2.0, 96.0, 0.0]]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], torch.tensor([[2.0, -2.0, 0.0]]))


def test_selection_has_no_gradient():
    logp = LOGP.clone().requires_grad_()
    for selected in (
        kl_cov_select(logp, ADVANTAGES, EVERY_TOKEN),
        clip_cov_select(logp, LOGP, ADVANTAGES, EVERY_TOKEN),
    ):
        assert selected.dtype == torch.bool
        assert not selected.requires_grad


def test_wrong_option_is_refused_by_name():
    x, mask = LOGP, EVERY_TOKEN
    share = "the share of trainable tokens to select must be between 0 and 1$"
    with pytest.raises(ValueError, match=rf"^ratio is 2; {share}"):
        kl_cov(x, x, x, mask, ratio=2)
    with pytest.raises(ValueError, match=rf"^ratio is -0\.1; {share}"):
        clip_cov(x, x, x, mask, ratio=-0.1)
    with pytest.raises(
        ValueError, match=r"^lower is 5\.0, upper is 5\.0; no covariance lies between, lower must be below"
    ):
        clip_cov_select(x, x, x, mask, lower=5.0)
    with pytest.raises(ValueError, match=r"^clip_low is 1\.0, clip_high is -1; both must be 0 or positive distances"):
        clip_cov(x, x, x, mask, clip_high=-1)
    with pytest.raises(ValueError, match=r"^beta is -1; the weight of the penalty must be 0 or positive$"):
        kl_cov(x, x, x, mask, beta=-1)
    for loss in (clip_cov, kl_cov):
        with pytest.raises(
            ValueError,
            match=r"^selected_NT is torch.bool of shape \(2, 4\); it must be torch.bool of the mask's shape \(1, 4\): "
            r"pass the rows of this micro-batch$",
        ):
            loss(x, x, x, mask, selected_NT=mask.expand(2, 4))
        with pytest.raises(ValueError, match=r"^selected_NT is torch.float32 of shape \(1, 4\); it must be torch.bool"):
            loss(x, x, x, mask, selected_NT=mask.float())
