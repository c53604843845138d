"""What must not change an update does not: micro-batches, padding, the order of prompts; for every algorithm."""

from __future__ import annotations

import pytest
import torch

from rllava_pl.modules import RLModule
from tests import runs
from tests.modules.passes import assert_close, fitted, gradient, one_pass, prompts


@pytest.fixture(scope="module", params=runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RLModule:
    """One entropy bonus for all, so that it is among what must not change."""
    return fitted(tmp_path_factory.mktemp("run"), request.param, entropy_coef=0.01)


def test_an_update_does_not_depend_on_micro_batches_padding_or_order(module: RLModule) -> None:
    algorithm = type(module)
    batch = prompts(algorithm)
    experience = one_pass(module, batch)
    whole = gradient(module, experience)
    assert whole.norm() > 1e-3
    if module.needs_rewards:
        assert len(set(experience.lengths_N.tolist())) > 1  # else padding and splits would prove little
    group = experience.group_size
    sizes = [size for size in (1, 2, group, 2 * group) if runs.accepts(algorithm, micro_batch_size=size)]
    assert len(sizes) >= 2
    for size in sizes:  # parts of a group, a group, two groups; pairs stay together
        assert_close(gradient(module, experience, size), whole)

    wider = experience.map(lambda x: torch.nn.functional.pad(x, (0, 5)) if x.ndim == 2 else x)
    assert_close(gradient(module, wider), whole)

    order = [4, 2, 0, 3, 1, 5]
    assert_close(gradient(module, experience.select(order)), whole)
    assert_close(gradient(module, one_pass(module, [batch[p] for p in order])), whole)  # and so for credit


def test_a_silent_micro_batch_adds_nothing_but_can_be_sent_through(module: RLModule) -> None:
    """What keeps a rank without rows in step with the others."""
    experience = one_pass(module, prompts(type(module), 2))
    counts = module.denominators(experience)
    silent = experience.map(lambda x: torch.zeros_like(x) if x.dtype == torch.bool else x)
    module.zero_grad()
    loss = module.loss(module(silent.batch), silent, counts)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)
