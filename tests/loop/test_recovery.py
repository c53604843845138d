"""A micro-batch that does not fit in memory is halved, which changes neither gradient nor log-probs nor metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rllava_pl.loop.micro_batches import is_out_of_memory
from rllava_pl.loop.options import KL
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.types import PolicyBatch, PolicyOutput, TrainingBatch
from tests import runs
from tests.modules.passes import assert_close, fitted, gradient, one_pass, prompts, recording_updater

ERRORS: dict[str, Callable[[], BaseException]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: torch.empty(2**50),  # what the allocator itself raises
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": lambda: MemoryError(),
}


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, TrainingBatch]:
    module = fitted(tmp_path_factory.mktemp("run"), GRPO, kl=KL(loss_coef=0.04))
    return module, one_pass(module, prompts(GRPO, 4))


class Full(torch.autograd.Function):
    """Memory that is full in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, error: Callable[[], BaseException]) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise ctx.error()


@contextmanager
def memory_for(module: RLModule, rows: int, error: str = "CUDA", *, backward: bool = False) -> Iterator[list[int]]:
    """A policy that holds so many completions at a time; gives the sizes that were tried."""
    forward, tried = module.policy.forward, []

    def bounded(batch: PolicyBatch, **options: bool) -> PolicyOutput:
        tried.append(len(batch.mask_NT))
        output = forward(batch, **options)
        if tried[-1] <= rows:
            return output
        if backward and torch.is_grad_enabled():
            return output._replace(logp_NT=Full.apply(output.logp_NT, ERRORS[error]))
        raise ERRORS[error]()

    module.policy.forward = bounded
    yield tried
    del module.policy.forward


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rows", [8, 3, 1])
def test_gradient_and_metrics_are_those_of_enough_memory(
    pass_of: tuple[RLModule, TrainingBatch], rows: int, backward: bool
) -> None:
    module, batch = pass_of
    module.metrics.clear()
    whole = gradient(module, batch)
    metrics = module.metrics.means()
    module.metrics.clear()
    updater, steps = recording_updater(module)
    updater.metrics = module.metrics  # so that what a failed attempt has added is taken back
    with memory_for(module, rows, backward=backward) as tried:
        assert updater.step(batch, module.terms, module.losses)
        assert_close(steps.gradients[0], whole)
        size = updater.micro_batches.size
        assert 1 <= size <= rows < 2 * (size + 1)
        means = module.metrics.means()
        assert {name: means[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        tried.clear()
        updater.step(batch, module.terms, module.losses)
        assert_close(steps.gradients[1], whole)
        assert max(tried) <= rows  # the size is remembered


@pytest.mark.parametrize("error", ERRORS)
def test_error_of_every_allocator_is_recognised(pass_of: tuple[RLModule, TrainingBatch], error: str) -> None:
    module, batch = pass_of
    updater, _ = recording_updater(module)
    whole = updater.forward(updater.adapter.model, batch)
    with memory_for(module, 8, error):
        parts = updater.forward(updater.adapter.model, batch)
    assert torch.allclose(parts.logp_NT, whole.logp_NT, atol=1e-5)
    assert 0 < updater.micro_batches.size <= 8


def test_single_completion_that_does_not_fit_stops_with_advice(pass_of: tuple[RLModule, TrainingBatch]) -> None:
    module, batch = pass_of
    advice = pytest.raises(RuntimeError, match=r"single completion .* lower sampling\.max_tokens")
    with memory_for(module, 0), advice:
        gradient(module, batch)


def test_other_errors_are_not_retried(pass_of: tuple[RLModule, TrainingBatch]) -> None:
    module, batch = pass_of
    forward = module.policy.forward
    module.policy.forward = lambda batch, **options: forward(batch, **options).logp_NT @ torch.ones(3, 1000)
    updater, _ = recording_updater(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        updater.step(batch, module.terms, module.losses)
    del module.policy.forward
    assert updater.micro_batches.size == 0
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))


def test_run_continues_and_logs_the_size(tmp_path: Path) -> None:
    def fit(rows: int) -> tuple[RLModule, dict[str, torch.Tensor]]:
        module = runs.module(max_rollouts=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = runs.trainer(tmp_path)
        with memory_for(module, rows):
            trainer.fit(module, runs.data())
        return module, trainer.callback_metrics

    (wide, logged), (narrow, logged_narrow) = fit(100), fit(3)
    assert logged["train/micro_batch_size"] == 8 and logged_narrow["train/micro_batch_size"] == 2
    for a, b in zip(wide.policy.parameters(), narrow.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_strategy_that_cannot_retry_names_the_option(
    pass_of: tuple[RLModule, TrainingBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = pass_of
    monkeypatch.setattr(module.updater.adapter, "can_retry", False)
    error = pytest.raises(RuntimeError, match=r"set batching\.micro_batch_size to 8")
    with memory_for(module, 8), error:
        gradient(module, batch)
