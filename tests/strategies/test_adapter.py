"""What a strategy is asked for, and which ones are refused."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from rllava_pl.strategies import RLDDPStrategy
from rllava_pl.strategies.adapter import SUPPORTED, check, clip_gradients, discard_gradients


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy, RLDDPStrategy])
def test_strategies_whose_gradients_are_right_pass(kind: type[Strategy]) -> None:
    check(kind())


REFUSED = {
    FSDPStrategy: "FSDPStrategy runs training_step inside the wrapper's forward",
    DeepSpeedStrategy: "DeepSpeedStrategy adds up the gradients of several micro-batches wrongly",
    ModelParallelStrategy: "ModelParallelStrategy is not known to train rightly here",
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_all_others_are_refused_with_what_to_use_instead(kind: type[Strategy], message: str) -> None:
    strategy = kind.__new__(kind)  # DeepSpeed's constructor needs the package
    with pytest.raises(ValueError, match=f"{message}.*{SUPPORTED}"):
        check(strategy)


def test_gradients_are_scaled_to_the_norm_and_the_old_norm_comes_back() -> None:
    """(3, 4) has norm 5; clipped to 1 it is (0.6, 0.8)."""
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = clip_gradients(SingleDeviceStrategy(), torch.optim.SGD([parameter], lr=1.0), 1.0)
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_discarded_gradients_are_gone() -> None:
    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, float("nan")])
    discard_gradients(SingleDeviceStrategy(), optimizer := torch.optim.SGD([parameter], lr=1.0))
    optimizer.step()
    assert parameter.grad is None
    torch.testing.assert_close(parameter.detach(), torch.ones(2))
