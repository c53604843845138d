"""What is not finite never reaches the weights: the update is left out whole, counted, and its samples are named."""

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

from rllava_pl.loop.guard import NonFiniteError, load
from rllava_pl.modules import PPO, RLModule
from rllava_pl.types import Experience
from tests import runs
from tests.modules.passes import fitted, one_pass, prompts

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, Experience]:
    """A critic and a reference beside the policy, so that every field is there; an update has been made."""
    module = fitted(tmp_path_factory.mktemp("run"), PPO, kl_loss_coef=0.04, micro_batch_size=4)
    return module, one_pass(module, prompts(PPO, 2))


def state(module: RLModule) -> dict[str, object]:
    """All that an update changes."""
    return copy.deepcopy(
        {
            "weights": module.state_dict(),
            "moments": module.optimizers().optimizer.state_dict(),
            "schedule": module.lr_schedulers().state_dict(),
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
def broken_loss(module: RLModule, experience: Experience, row: int, value: float) -> Iterator[Experience]:
    """The loss of the micro-batch that holds the row."""
    original, victim = module.loss, experience.rollouts[row]

    def loss(output, batch, counts):
        return original(output, batch, counts) * (value if any(r is victim for r in batch.rollouts) else 1.0)

    module.loss = loss
    yield experience
    del module.loss


@contextmanager
def broken_gradient(module: RLModule, experience: Experience, row: int, value: float) -> Iterator[Experience]:
    """One entry of one parameter's gradient; every loss is finite."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    mask = torch.zeros_like(parameters[row])
    mask.view(-1)[0] = value
    hook = parameters[row].register_hook(lambda gradient: gradient + mask)
    yield experience
    hook.remove()


@contextmanager
def broken_field(
    module: RLModule, experience: Experience, row: int, value: float, name: str = ""
) -> Iterator[Experience]:
    """One number of a tensor."""
    x = getattr(experience, name).clone()
    x[row] = value
    yield experience.replace(**{name: x})


FIELDS = ("rewards_N", "advantages_NT", "old_logp_NT", "ref_logp_NT", "engine_logp_NT", "values_NT")
PLACES = {"loss": broken_loss, "gradient": broken_gradient} | dict.fromkeys(FIELDS, broken_field)


@pytest.mark.parametrize("place", PLACES)
def test_twenty_of_twenty_updates_are_left_out_whole(
    pass_of: tuple[RLModule, Experience], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, experience = pass_of
    before, options = state(module), {"name": place} if place in FIELDS else {}
    for k in range(20):
        row, module.skipped_in_a_row = 7 * k % len(experience), 0
        module.tally.clear()
        caplog.clear()
        with PLACES[place](module, experience, row, NOT_FINITE[k % 3], **options) as minibatch:
            module.update(minibatch)
        assert equal(state(module), before), (place, k)
        assert not any(p.grad is not None and p.grad.any() for p in module.parameters())
        means = module.tally.means()
        assert means["skipped_nonfinite"] == 1.0 and "loss" not in means
        told = caplog.messages[-1]
        uid = f"{experience.rollouts[row].prompt.uid}#{row % experience.group_size}"
        assert uid in told if place != "gradient" else "the gradient alone" in told
        assert place.partition("_")[0] in told
    module.skipped_in_a_row = 0


def test_an_update_that_is_sound_goes_on_as_if_nothing_had_been(pass_of: tuple[RLModule, Experience]) -> None:
    module, experience = pass_of
    before = state(module)
    with broken_loss(module, experience, 3, math.nan) as minibatch:
        module.update(minibatch)
    assert module.skipped_in_a_row == 1
    updates = module.weight_version
    module.update(experience)
    after = state(module)
    assert module.weight_version == updates + 1 and module.skipped_in_a_row == 0
    module.load_state_dict(before["weights"])
    module.optimizers().optimizer.load_state_dict(before["moments"])
    module.update(experience)
    assert equal(state(module)["weights"], after["weights"])


def test_after_k_in_a_row_the_run_stops_and_its_batch_can_be_replayed(tmp_path: Path) -> None:
    module = runs.module(max_rollouts=6, max_skipped=3)
    module.policy_loss = lambda logp_NT, batch: logp_NT * math.nan
    with pytest.raises(NonFiniteError, match=r"rollout 1: an update was left out.*number 3 in a row") as error:
        runs.trainer(tmp_path).fit(module, runs.data())
    assert module.weight_version == 0 and module.rollout_index == 1  # two updates of the first rollout, one of the next
    path = re.search(r"is in (\S+\.pt)$", str(error.value))[1]
    experience = load(path)
    assert len(experience) == 8 and experience.rollouts[0].prompt.images[0].size == (56, 56)
    del module.policy_loss
    module.update(experience)
    assert module.weight_version == 1


def test_a_file_that_is_no_experience_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"holds 'None', which this version does not know"):
        load(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no experience"):
        load(tmp_path / "list.pt")


def test_the_coefficient_of_kl_survives_a_divergence_that_is_not_finite(tmp_path: Path) -> None:
    module = runs.module(max_rollouts=1, kl_loss_coef=0.01, kl_target=0.1)
    original = module.evaluate

    def evaluate(experience: Experience) -> Experience:
        experience = original(experience)
        return experience.replace(old_logp_NT=experience.old_logp_NT / 0.0)

    module.evaluate = evaluate
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.kl_controller.coef == 1.0
    assert trainer.callback_metrics["train/skipped_nonfinite"] == 2.0


def test_max_skipped_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_skipped is 0"):
        runs.module(max_skipped=0)


def test_a_healthy_run_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rllava_pl.loop.guard"):
        trainer = runs.trainer(tmp_path)
        trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert "train/skipped_nonfinite" not in trainer.callback_metrics
    assert not [r for r in caplog.records if r.name.startswith("rllava_pl")]
