"""One optimizer step from explicit inputs: a linear policy, no Trainer, no language model."""

from __future__ import annotations

import logging
from math import inf, nan
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from rllava_pl.loop.batch import masked_out
from rllava_pl.loop.guard import NonFiniteError, load_batch
from rllava_pl.loop.metrics import MetricAccumulator
from rllava_pl.loop.options import Batching
from rllava_pl.loop.state import RunState
from rllava_pl.loop.updater import Updater
from rllava_pl.strategies.adapter import StrategyAdapter
from rllava_pl.types import PolicyBatch, PolicyOutput, Term, TrainingBatch
from tests.modules.cases import scored, trainable

LENGTHS = [1, 4, 2, 2, 3, 1]


class Linear(nn.Module):
    """log π(token) = weight x token id."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.1))

    def forward(self, batch: PolicyBatch) -> PolicyOutput:
        logp_NT = (self.weight * batch.response_ids_NT) * batch.mask_NT
        return PolicyOutput(logp_NT, logp_NT.detach().abs())


class Adapter(StrategyAdapter):
    """A single device, the model given; counts what it is called for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(SingleDeviceStrategy(torch.device("cpu")))
        self.given = model

    @property
    def model(self) -> nn.Module:
        return self.given

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Steps:
    """What a LightningOptimizer is to the updater."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Run:
    """An updater with all that it needs."""

    def __init__(self, root: Path = Path(), **options: object) -> None:
        self.model, self.state, self.metrics = Linear(), RunState(), MetricAccumulator()
        batching = options.pop("batching", Batching())
        arguments = {"max_grad_norm": inf, "max_skipped": 5, "max_tokens": 8} | options
        self.updater = Updater(batching, state=self.state, metrics=self.metrics, **arguments)
        self.updater.connect(Adapter(self.model), root)
        sgd = torch.optim.SGD(self.model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
        self.updater.connect_optimizer(Steps(sgd), schedule)

    @property
    def weight(self) -> float:
        return float(self.model.weight.detach())


@pytest.fixture
def batch() -> TrainingBatch:
    """Three groups of two; token ids are 5, 6, ..., advantage 1."""
    return trainable(scored([[1, 0]] * 3, tokens=LENGTHS))


def terms(batch: TrainingBatch) -> dict[str, Term]:
    return {"policy": Term(batch.trained_mask_NT)}


def losses(output: PolicyOutput, batch: TrainingBatch) -> dict[str, Tensor]:
    return {"policy": output.logp_NT}


IDS = [5 + t for length in LENGTHS for t in range(length)]


def test_step_is_the_gradient_of_the_mean_over_tokens(batch: TrainingBatch) -> None:
    run = Run()
    assert run.updater.step(batch, terms, losses)
    mean_id = sum(IDS) / len(IDS)
    assert run.weight == pytest.approx(-0.1 - mean_id)
    assert run.state.updates == 1
    assert run.updater.optimizer.optimizer.param_groups[0]["lr"] == 0.5  # the schedule has moved
    means = run.metrics.means()
    assert means["loss"] == means["policy_loss"] == pytest.approx(-0.1 * mean_id)
    assert means["grad_norm"] == pytest.approx(mean_id) and means["micro_batch_size"] == 6


@pytest.mark.parametrize("batching", [Batching(micro_batch_size=k) for k in (1, 2, 3, 4)], ids=str)
def test_step_does_not_depend_on_micro_batches(batch: TrainingBatch, batching: Batching) -> None:
    whole, parts = Run(), Run(batching=batching)
    for run in (whole, parts):
        run.updater.step(batch, terms, losses)
    assert parts.weight == pytest.approx(whole.weight, rel=1e-6)
    means, expected = parts.metrics.means(), whole.metrics.means()
    assert means.pop("micro_batch_size") <= batching.micro_batch_size < expected.pop("micro_batch_size")
    assert means == pytest.approx(expected, rel=1e-5)


def test_loss_is_the_weighted_sum_of_all_terms(batch: TrainingBatch) -> None:
    """0.5 x the mean over sequences of sums, on the first token of each row alone, beside the token mean."""
    first_NT = torch.zeros_like(batch.trained_mask_NT)
    first_NT[:, 0] = True

    def two_terms(part: TrainingBatch) -> dict[str, Term]:
        first = first_NT[: len(part), : part.trained_mask_NT.shape[1]]
        return terms(part) | {"first": Term(first, "sequence-mean-token-sum", 0.5)}

    def two_losses(output: PolicyOutput, part: TrainingBatch) -> dict[str, Tensor]:
        return {"policy": output.logp_NT, "first": output.logp_NT.square()}

    run = Run(batching=Batching(micro_batch_size=3))
    assert {name: float(n) for name, n in run.updater.denominators(two_terms(batch)).items()} == {
        "policy": 13.0,
        "first": 6.0,
    }
    run.updater.step(batch, two_terms, two_losses)
    means = run.metrics.means()
    assert means["first_loss"] == pytest.approx(0.25, rel=1e-5)  # (-0.1 x 5)²
    assert means["loss"] == pytest.approx(means["policy_loss"] + 0.5 * means["first_loss"], rel=1e-6)
    assert run.weight == pytest.approx(-0.1 - sum(IDS) / len(IDS) - 0.5 * 2 * -0.5 * 5, rel=1e-5)


def test_term_with_weight_zero_is_reported_and_trains_nothing(batch: TrainingBatch) -> None:
    run = Run()
    run.updater.step(batch, lambda part: {"policy": Term(part.trained_mask_NT, weight=0.0)}, losses)
    means = run.metrics.means()
    assert run.weight == pytest.approx(-0.1) and means["loss"] == 0 and means["policy_loss"] < 0


def test_gradient_is_clipped_to_its_norm(batch: TrainingBatch) -> None:
    run = Run(max_grad_norm=0.25)
    run.updater.step(batch, terms, losses)
    assert run.weight == pytest.approx(-0.1 - 0.25, rel=1e-4)
    assert run.metrics.means()["grad_norm"] == pytest.approx(sum(IDS) / len(IDS))


def test_masked_out_minibatch_is_skipped_and_counted(batch: TrainingBatch) -> None:
    run = Run()
    assert not run.updater.step(masked_out(batch), terms, losses)
    assert run.weight == pytest.approx(-0.1) and run.state.updates == 0
    assert run.metrics.means() == {"skipped_updates": 1.0}


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_loss_that_is_not_finite_is_skipped_and_its_samples_are_named(
    batch: TrainingBatch, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 3, the second sample of prompt b."""

    def broken(output: PolicyOutput, part: TrainingBatch) -> dict[str, Tensor]:
        hit = any(rollout is batch.rollouts[3] for rollout in part.rollouts)
        return {"policy": output.logp_NT * (value if hit else 1.0)}

    run = Run(batching=Batching(micro_batch_size=1))
    with caplog.at_level(logging.WARNING):
        assert not run.updater.step(batch, terms, broken)
    assert run.weight == pytest.approx(-0.1) and run.model.weight.grad is None
    assert (run.state.updates, run.state.skipped_in_a_row) == (0, 1)
    assert run.metrics.means() == {"skipped_nonfinite": 1.0}
    assert "rollout 0: an update was skipped, not finite: loss of b#1" in caplog.text
    assert run.updater.step(batch, terms, losses) and run.state.skipped_in_a_row == 0


def test_too_many_skipped_updates_end_the_run_with_the_batch_on_disk(batch: TrainingBatch, tmp_path: Path) -> None:
    run = Run(tmp_path, max_skipped=2)
    broken = batch.replace(advantages_NT=batch.advantages_NT * nan)
    assert not run.updater.step(broken, terms, losses)
    with pytest.raises(NonFiniteError, match=r"advantages of a#0.*It is number 2 in a row; its mini-batch is in"):
        run.updater.step(broken, terms, losses)
    dumped = load_batch(tmp_path / "nonfinite-000000-rank-0.pt")
    assert len(dumped) == 6 and dumped.rollouts[0].prompt.uid == "a"


def test_out_of_memory_repeats_the_step_in_smaller_micro_batches(batch: TrainingBatch) -> None:
    whole, narrow = Run(), Run()

    def limited(output: PolicyOutput, part: TrainingBatch) -> dict[str, Tensor]:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        narrow.metrics.add("seen", torch.tensor(float(len(part))))
        return losses(output, part)

    whole.updater.step(batch, terms, losses)
    assert narrow.updater.step(batch, terms, limited)
    assert narrow.weight == pytest.approx(whole.weight, rel=1e-6)
    assert narrow.updater.micro_batches.size == 3 and narrow.metrics.means()["seen"] == 2.0  # whole groups


def test_forward_joins_micro_batches_and_needs_no_optimizer(batch: TrainingBatch) -> None:
    run = Run(batching=Batching(micro_batch_size=3))
    output = run.updater.forward(run.model, batch)
    torch.testing.assert_close(output.logp_NT, -0.1 * batch.response_ids_NT)
    assert output.values_NT is None and not output.logp_NT.requires_grad
    first_NT = torch.zeros_like(batch.trained_mask_NT)
    first_NT[:, 0] = True
    masked = run.updater.forward(run.model, batch, first_NT)
    assert masked.logp_NT[:, 1:].abs().sum() == 0 and masked.logp_NT[:, 0].all()


def test_interruption_between_micro_batches_ends_the_step(batch: TrainingBatch) -> None:
    def stop() -> None:
        raise InterruptedError

    run = Run(between_micro_batches=stop)
    with pytest.raises(InterruptedError):
        run.updater.step(batch, terms, losses)
    assert run.state.updates == 0
