"""What must not change an update does not: micro-batches, padding, the order of prompts; for every algorithm."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.loop.batch import masked_out
from rllava_pl.loop.micro_batches import MicroBatches, row_tokens
from rllava_pl.loop.options import Batching
from rllava_pl.modules import PolicyModule, RLModule
from tests import runs
from tests.modules.passes import (
    assert_close,
    fitted,
    gradient,
    one_pass,
    prompts,
    recording_updater,
    with_selection,
)


@pytest.fixture(scope="module", params=runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicyModule:
    """One entropy bonus for all that have one, so that it is among what must not change."""
    bonus = {"entropy_coef": 0.01} if issubclass(request.param, RLModule) else {}
    return fitted(tmp_path_factory.mktemp("run"), request.param, **bonus)


def test_gradient_does_not_depend_on_micro_batches_padding_or_order(module: PolicyModule) -> None:
    algorithm = type(module)
    rows = prompts(algorithm)
    batch = one_pass(module, rows)
    whole = gradient(module, batch)
    assert whole.norm() > 1e-3
    if module.needs_rewards:
        assert len(set(batch.lengths_N.tolist())) > 1  # else padding and splits would prove little
    group = batch.group_size
    for size in {1, 2, 3, group, 2 * group}:  # parts of a group, some of them unequal, a group, two groups
        assert_close(gradient(module, batch, size), whole)
    most = max(row_tokens(batch))
    for tokens in {1, most // 2, most, 2 * most}:
        assert_close(gradient(module, batch, tokens=tokens), whole)

    wider = batch.map(lambda x: torch.nn.functional.pad(x, (0, 5)) if x.ndim == 2 else x)
    assert_close(gradient(module, wider), whole)

    order = [4, 2, 0, 3, 1, 5]
    assert_close(gradient(module, batch.select(order)), whole)
    assert_close(gradient(module, one_pass(module, [rows[p] for p in order])), whole)  # and so for credit


def test_micro_batches_stay_below_the_token_limit_while_a_row_fits(module: PolicyModule) -> None:
    batch = one_pass(module, prompts(type(module)))
    together = module.rows_together
    widest = max(
        len(inputs) + together * max(len(r.response_ids) for r in rows)
        for inputs, rows in zip(batch.inputs, grouped(batch), strict=True)
    )
    for limit in (widest, widest + 7, 2 * max(row_tokens(batch))):
        parts = MicroBatches(Batching(micro_batch_tokens=limit), together).split(batch, len(batch))
        assert all(sum(row_tokens(part)) <= limit for part in parts)
        assert sum(map(len, parts)) == len(batch)


def grouped(batch):
    size = batch.group_size
    return [batch.rollouts[p * size : (p + 1) * size] for p in range(len(batch.inputs))]


def test_masked_out_micro_batch_has_loss_zero_and_gradient_zero(module: PolicyModule) -> None:
    """It is what a rank without rows sends through the model while others train."""
    batch = with_selection(module, one_pass(module, prompts(type(module), 2)))
    updater, _ = recording_updater(module)
    counts = updater.denominators(module.terms(batch))
    nothing = masked_out(batch)
    losses = module.losses(module(nothing.policy_batch()), nothing)
    budget = {"max_tokens": module.sampling.max_tokens}
    total = sum(
        term.weight * reduce_loss(losses[name], term.mask_NT, term.aggregation, denominator=counts[name], **budget)
        for name, term in module.terms(nothing).items()
    )
    assert total == 0 and total.requires_grad
    total.backward()
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)
