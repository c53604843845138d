"""What adapters do on one device, and which strategies are refused."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.utils.data import DataLoader

from rllava_pl.strategies import RLDDPStrategy, RLFSDP2Strategy, RLFSDPStrategy, StrategyAdapter, adapter_for
from rllava_pl.strategies.adapter import SUPPORTED, DDPAdapter
from rllava_pl.strategies.fsdp import FSDP2Adapter, FSDPAdapter

ADAPTERS = {
    SingleDeviceStrategy: StrategyAdapter,
    DDPStrategy: DDPAdapter,
    RLDDPStrategy: DDPAdapter,
    RLFSDPStrategy: FSDPAdapter,
    RLFSDP2Strategy: FSDP2Adapter,
}


@pytest.mark.parametrize(("kind", "adapter"), ADAPTERS.items(), ids=lambda x: x.__name__)
def test_supported_strategy_has_the_adapter_of_its_backend(
    kind: type[Strategy], adapter: type[StrategyAdapter]
) -> None:
    assert type(adapter_for(kind())) is adapter


def test_only_full_copies_can_be_retried_and_called_out_of_lockstep() -> None:
    for kind in ADAPTERS:
        adapter = adapter_for(kind())
        full = kind in (SingleDeviceStrategy, DDPStrategy, RLDDPStrategy)
        assert (adapter.can_retry, adapter.lockstep) == (full, not full), kind


REFUSED = {
    FSDPStrategy: "FSDPStrategy runs training_step inside the wrapper's forward",
    DeepSpeedStrategy: "DeepSpeedStrategy accumulates the gradients of several micro-batches incorrectly",
    ModelParallelStrategy: "ModelParallelStrategy is not supported: its gradients are unverified here",
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_other_strategy_is_refused_with_what_to_use_instead(kind: type[Strategy], message: str) -> None:
    strategy = kind.__new__(kind)  # DeepSpeed's constructor needs the package
    with pytest.raises(ValueError, match=f"{message}.*{SUPPORTED}"):
        adapter_for(strategy)


def test_strategy_of_a_user_names_its_adapter() -> None:
    class OwnAdapter(StrategyAdapter):
        can_retry = False

    class OwnStrategy(ModelParallelStrategy):
        adapter_class = OwnAdapter

    assert type(adapter_for(OwnStrategy())) is OwnAdapter


def test_gradients_are_scaled_to_the_norm_and_the_previous_norm_is_returned() -> None:
    """(3, 4) has norm 5; clipped to 1 it is (0.6, 0.8)."""
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = adapter_for(SingleDeviceStrategy()).clip_grad_norm(torch.optim.SGD([parameter], lr=1.0), 1.0)
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_discarded_gradients_change_no_weight() -> None:
    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, float("nan")])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    adapter_for(SingleDeviceStrategy()).discard_gradients(optimizer)
    optimizer.step()
    assert parameter.grad is None
    torch.testing.assert_close(parameter.detach(), torch.ones(2))


class Quadratic(LightningModule):
    """Steps twice on (w - 3)^2 / 2 in two micro-batches each, through the adapter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight - x) ** 2 / 2

    def training_step(self, step: int, batch_idx: int) -> None:
        adapter, optimizer = adapter_for(self.trainer.strategy), self.optimizers()
        for last in (False, True):
            with adapter.accumulate(last):
                adapter.backward(adapter.model(torch.tensor(3.0)) / 2)
        adapter.clip_grad_norm(optimizer.optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader([0, 1], batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_backward_accumulates_over_micro_batches() -> None:
    """Gradients -3 and -2 are clipped to -1 each: the weight goes from 0 to 1 and to 2."""
    module = Quadratic()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet).fit(module)
    assert float(module.weight) == pytest.approx(2.0)
