"""A micro-batch that does not fit is halved, and neither gradient nor log-probs nor metrics notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rllava_pl.loop.recovery import out_of_memory
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.types import Experience, PolicyBatch, PolicyOutput
from tests import runs
from tests.modules.passes import assert_close, fitted, gradient, one_pass, prompts

ERRORS: dict[str, Callable[[], BaseException]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: torch.empty(2**50),  # what the allocator itself says
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": lambda: MemoryError(),
}


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, Experience]:
    module = fitted(tmp_path_factory.mktemp("run"), GRPO, kl_loss_coef=0.04)
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
def room_for(module: RLModule, rows: int, error: str = "CUDA", *, backward: bool = False) -> Iterator[list[int]]:
    """A policy that holds so many completions at a time; gives the sizes that were tried."""
    forward, tried = module.policy.forward, []

    def bounded(batch: PolicyBatch) -> PolicyOutput:
        tried.append(len(batch.mask_NT))
        output = forward(batch)
        if tried[-1] <= rows:
            return output
        if backward and torch.is_grad_enabled():
            return output._replace(logp_NT=Full.apply(output.logp_NT, ERRORS[error]))
        raise ERRORS[error]()

    module.policy.forward = bounded
    yield tried
    del module.policy.forward
    module.micro_batch_size = 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rows", [8, 3, 1])
def test_the_gradient_is_that_of_a_card_with_room(
    pass_of: tuple[RLModule, Experience], rows: int, backward: bool
) -> None:
    module, experience = pass_of
    module.tally.clear()
    whole = gradient(module, experience)
    metrics = module.tally.means()
    module.tally.clear()
    with room_for(module, rows, backward=backward) as tried:
        assert_close(gradient(module, experience), whole)
        assert 1 <= module.micro_batch_size <= rows < 2 * (module.micro_batch_size + 1)
        assert module.tally.means() == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        tried.clear()
        assert_close(gradient(module, experience, module.micro_batch_size), whole)
        assert max(tried) <= rows  # the size is remembered


@pytest.mark.parametrize("error", ERRORS)
def test_every_allocator_is_understood(pass_of: tuple[RLModule, Experience], error: str) -> None:
    module, experience = pass_of
    whole = module.score(module.policy, experience)
    with room_for(module, 8, error):
        parts = module.score(module.policy, experience)
    assert torch.allclose(parts.logp_NT, whole.logp_NT, atol=1e-5)


def test_a_single_completion_that_does_not_fit_stops_with_advice(pass_of: tuple[RLModule, Experience]) -> None:
    module, experience = pass_of
    with room_for(module, 0), pytest.raises(RuntimeError, match=r"single completion .* lower sampling\.max_tokens"):
        module.update(experience)


def test_other_errors_are_not_taken_for_it(pass_of: tuple[RLModule, Experience]) -> None:
    module, experience = pass_of
    forward = module.policy.forward
    module.policy.forward = lambda batch: forward(batch).logp_NT @ torch.ones(3, 1000)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module.update(experience)
    del module.policy.forward
    assert module.micro_batch_size == 0
    assert not out_of_memory(RuntimeError("expected scalar type Float"))


def test_a_run_goes_on_and_logs_the_size(tmp_path: Path) -> None:
    def fit(rows: int) -> tuple[RLModule, dict[str, torch.Tensor]]:
        module = runs.module(max_rollouts=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = runs.trainer(tmp_path)
        build = module.configure_model

        def configure_model() -> None:
            build()
            forward = module.policy.forward

            def bounded(batch: PolicyBatch) -> PolicyOutput:
                if len(batch.mask_NT) > rows:
                    raise ERRORS["CUDA"]()
                return forward(batch)

            module.policy.forward = bounded

        module.configure_model = configure_model
        trainer.fit(module, runs.data())
        return module, trainer.callback_metrics

    (wide, logged), (narrow, logged_narrow) = fit(100), fit(3)
    assert logged["train/micro_batch_size"] == 8 and logged_narrow["train/micro_batch_size"] == 2
    for a, b in zip(wide.policy.parameters(), narrow.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_strategy_that_cannot_begin_again_says_what_to_set(
    pass_of: tuple[RLModule, Experience], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, experience = pass_of
    monkeypatch.setattr("rllava_pl.strategies.adapter.restarts", lambda strategy: False)
    with room_for(module, 8), pytest.raises(RuntimeError, match="set micro_batch_size to 8"):
        module.update(experience)
