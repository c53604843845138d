"""What is not finite never reaches the weights: the update is skipped whole, counted, and its samples are named."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rllava_pl.loop.guard import NonFiniteError, describe, load_batch
from rllava_pl.loop.options import KL, Batching
from rllava_pl.modules import GRPO, PPO, RLModule
from rllava_pl.types import TrainingBatch
from tests import runs
from tests.modules.passes import fitted, one_pass, prompts

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, TrainingBatch]:
    """A critic and a reference beside the policy, so that every tensor is there; an update has been made."""
    batching = Batching(num_minibatches=2, micro_batch_size=4)
    module = fitted(tmp_path_factory.mktemp("run"), PPO, kl=KL(loss_coef=0.04), batching=batching)
    return module, one_pass(module, prompts(PPO, 2))


def update(module: RLModule, batch: TrainingBatch) -> bool:
    return module.updater.step(batch, module.terms, module.losses)


def state(module: RLModule) -> dict[str, object]:
    """All that an update changes."""
    return copy.deepcopy(
        {
            "weights": module.state_dict(),
            "moments": module.optimizers().optimizer.state_dict(),
            "schedule": module.lr_schedulers().state_dict(),
            "updates": module.state.updates,
        }
    )


def equal(a: object, b: object) -> bool:
    """Bit by bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@contextmanager
def broken_loss(module: RLModule, batch: TrainingBatch, row: int, value: float) -> Iterator[TrainingBatch]:
    """The loss of the micro-batch that holds the row."""
    losses, victim = module.losses, batch.rollouts[row]

    def broken(output, part):
        factor = value if any(rollout is victim for rollout in part.rollouts) else 1.0
        return {name: loss_NT * factor for name, loss_NT in losses(output, part).items()}

    module.losses = broken
    yield batch
    del module.losses


@contextmanager
def broken_gradient(module: RLModule, batch: TrainingBatch, row: int, value: float) -> Iterator[TrainingBatch]:
    """One entry of one parameter's gradient; every loss is finite."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    mask = torch.zeros_like(parameters[row])
    mask.view(-1)[0] = value
    hook = parameters[row].register_hook(lambda gradient: gradient + mask)
    yield batch
    hook.remove()


@contextmanager
def broken_field(
    module: RLModule, batch: TrainingBatch, row: int, value: float, name: str = ""
) -> Iterator[TrainingBatch]:
    """One number of a tensor."""
    x = getattr(batch, name).clone()
    x[row] = value
    yield batch.with_computed(**{name: x}) if name in batch.computed else batch.replace(**{name: x})


FIELDS = (
    "scores_N",
    "rewards_N",
    "advantages_NT",
    "returns_NT",
    "old_logp_NT",
    "ref_logp_NT",
    "engine_logp_NT",
    "values_NT",
)
PLACES = {"loss": broken_loss, "gradient": broken_gradient} | dict.fromkeys(FIELDS, broken_field)


@pytest.mark.parametrize("place", PLACES)
def test_twenty_of_twenty_updates_are_skipped_whole(
    pass_of: tuple[RLModule, TrainingBatch], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, batch = pass_of
    before, options = state(module), {"name": place} if place in FIELDS else {}
    for k in range(20):
        row, module.state.skipped_in_a_row = 7 * k % len(batch), 0
        module.metrics.clear()
        caplog.clear()
        with PLACES[place](module, batch, row, NOT_FINITE[k % 3], **options) as minibatch:
            assert not update(module, minibatch)
        assert equal(state(module), before), (place, k)
        assert not any(p.grad is not None and p.grad.any() for p in module.parameters())
        means = module.metrics.means()
        assert means["skipped_nonfinite"] == 1.0 and "loss" not in means
        message = caplog.messages[-1]
        uid = f"{batch.rollouts[row].prompt.uid}#{row % batch.group_size}"
        assert uid in message if place != "gradient" else "the gradient alone" in message
        assert place.partition("_")[0] in message
    module.state.skipped_in_a_row = 0


def test_finite_update_after_a_skipped_one_is_as_if_nothing_had_been(
    pass_of: tuple[RLModule, TrainingBatch],
) -> None:
    module, batch = pass_of
    before = state(module)
    with broken_loss(module, batch, 3, math.nan) as minibatch:
        update(module, minibatch)
    assert module.state.skipped_in_a_row == 1
    updates = module.state.updates
    assert update(module, batch)
    after = state(module)
    assert module.state.updates == updates + 1 and module.state.skipped_in_a_row == 0
    module.load_state_dict(before["weights"])
    module.optimizers().optimizer.load_state_dict(before["moments"])
    update(module, batch)
    assert equal(state(module)["weights"], after["weights"])


class Broken(GRPO):
    """A loss that is not finite until it is repaired."""

    factor = math.nan

    def policy_loss(self, logp_NT, batch):
        return super().policy_loss(logp_NT, batch) * self.factor


def test_run_stops_after_max_skipped_and_its_batch_can_be_trained_again(tmp_path: Path) -> None:
    module = runs.module(Broken, max_rollouts=6, max_skipped=3)
    with pytest.raises(NonFiniteError, match=r"rollout 1: an update was skipped.*number 3 in a row") as error:
        runs.trainer(tmp_path).fit(module, runs.data())
    assert module.state.updates == 0 and module.state.rollouts == 1  # two of the first rollout, one of the next
    path = re.search(r"is in (\S+\.pt)$", str(error.value))[1]
    batch = load_batch(path)
    assert len(batch) == 8 and batch.rollouts[0].prompt.images[0].size == (56, 56)
    module.factor = 1.0
    assert update(module, batch) and module.state.updates == 1


def test_file_that_holds_no_batch_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError):
        load_batch(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError):
        load_batch(tmp_path / "list.pt")


def test_description_names_at_most_eight_samples_of_all_ranks() -> None:
    parts = [
        {"advantages": [f"a#{n}" for n in range(6)]},
        {"advantages": [f"b#{n}" for n in range(4)], "loss": ["c#0"]},
    ]
    expected = "advantages of a#0, a#1, a#2, a#3, a#4, a#5, b#0, b#1 and 2 more; loss of c#0"
    assert describe(parts) == expected and describe([{}, {}]) == ""


def test_coefficient_of_kl_survives_a_divergence_that_is_not_finite(tmp_path: Path) -> None:
    class Diverged(GRPO):
        def compute_logprobs(self, batch):
            batch = super().compute_logprobs(batch)
            return batch.with_computed(old_logp_NT=batch.old_logp_NT / 0.0)

    module = runs.module(Diverged, max_rollouts=1, kl=KL(loss_coef=0.01, target=0.1))
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.state.kl_factor == 1.0
    assert trainer.callback_metrics["train/skipped_nonfinite"] == 2.0


def test_healthy_run_logs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rllava_pl.loop"):
        trainer = runs.trainer(tmp_path)
        trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert "train/skipped_nonfinite" not in trainer.callback_metrics
    assert not [r for r in caplog.records if r.name.startswith("rllava_pl")]
