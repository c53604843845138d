"""Dynamic sampling: uninformative groups are replaced, within bounds, and nothing is lost at a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.group_buffer import GroupBuffer
from rllava_pl.loop.options import DynamicSampling
from rllava_pl.modules import DAPO, GPG, RLModule
from rllava_pl.modules.policy_module import STATE
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Rollout, Score, ScoredBatch
from tests import runs
from tests.modules.cases import scored

ALL_RIGHT, ALL_WRONG, SOME = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def empty_buffer(max_rounds: int = 3, min_informative: float = 1.0, component: str = "accuracy") -> GroupBuffer:
    return GroupBuffer(DynamicSampling(max_rounds, min_informative, component))


def uids(batch: ScoredBatch) -> str:
    return "".join(r.prompt.uid for r in batch.rollouts[:: batch.group_size])


def test_without_further_rounds_every_batch_is_taken_as_it_is() -> None:
    batch = scored([ALL_RIGHT, ALL_WRONG])
    assert empty_buffer(max_rounds=0).add(batch, 2) is batch


def test_uninformative_groups_are_replaced_and_the_batch_keeps_its_size() -> None:
    buffer = empty_buffer()
    assert buffer.add(scored([SOME, ALL_RIGHT, ALL_WRONG], uids="abc"), 3) is None
    assert buffer.add(scored([ALL_WRONG, SOME, ALL_RIGHT], uids="def"), 3) is None
    assert buffer.rounds == 2
    batch = buffer.add(scored([SOME, SOME, SOME], uids="ghi"), 3)
    assert uids(batch) == "aeg" and batch.trained_mask_NT.all()
    assert buffer.rounds == 0 and buffer.extra_rounds == 2


def test_format_bonus_does_not_make_a_group_informative() -> None:
    """A bonus that differs within a group leaves it all wrong."""
    batch = scored([ALL_WRONG, SOME], format_NG=0.1)
    assert empty_buffer().informative(batch).tolist() == [False, False, True, True]
    assert empty_buffer(max_rounds=0).informative(batch).all()  # where nothing is replaced, the whole score decides
    assert empty_buffer().add(batch, 2) is None


def test_rounds_of_unequal_width_are_joined() -> None:
    buffer = empty_buffer()
    buffer.add(scored([SOME], uids="a"), 2)
    batch = buffer.add(scored([SOME], uids="b", tokens=[5, 3]), 2)
    assert batch.lengths_N.tolist() == [2, 2, 5, 3]
    assert batch.response_ids_NT[0].tolist() == [5, 6, 0, 0, 0]


def test_after_the_last_round_training_continues_with_fewer_groups(caplog: pytest.LogCaptureFixture) -> None:
    buffer = empty_buffer(max_rounds=1)
    assert buffer.add(scored([SOME, ALL_RIGHT], uids="ab"), 2) is None
    with caplog.at_level(logging.WARNING):
        batch = buffer.add(scored([ALL_RIGHT, ALL_WRONG], uids="cd"), 2)
    assert uids(batch) == "a"
    assert "1 of 2 wanted groups are informative after 2 rounds of generation; continuing with them" in caplog.text


def test_without_an_informative_group_one_stays_masked_out() -> None:
    buffer = empty_buffer(max_rounds=1)
    buffer.add(scored([ALL_RIGHT, ALL_WRONG]), 2)
    nothing = buffer.add(scored([ALL_RIGHT, ALL_WRONG]), 2)
    assert len(nothing) == 2 and not nothing.trained_mask_NT.any()


def test_batch_with_enough_informative_groups_is_filled_up_with_others() -> None:
    """60 % of 5 is 3: two are not enough."""
    buffer = empty_buffer(min_informative=0.6)
    assert buffer.add(scored([SOME, ALL_RIGHT, ALL_WRONG, SOME, ALL_RIGHT], uids="abcde"), 5) is None
    batch = buffer.add(scored([ALL_RIGHT, SOME, ALL_WRONG, SOME, SOME], uids="fghij"), 5)
    assert uids(batch) == "adgij"
    batch = buffer.add(scored([SOME, ALL_RIGHT, SOME, SOME, ALL_WRONG], uids="abcde"), 5)
    assert uids(batch) == "abcde"


def test_component_that_no_reward_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dynamic_sampling.component is 'iou'; the rewards have accuracy"):
        empty_buffer(1, 1.0, "iou").add(scored([SOME]), 1)


def test_rollback_forgets_a_round() -> None:
    buffer = empty_buffer()
    buffer.add(scored([SOME], uids="a"), 2)
    snapshot = buffer.snapshot()
    buffer.add(scored([ALL_WRONG], uids="b"), 2)
    buffer.rollback(snapshot)
    assert buffer.rounds == 1 and uids(buffer.parts[0]) == "a"


def test_state_is_restored_on_the_same_number_of_ranks() -> None:
    buffer, other = empty_buffer(), empty_buffer()
    buffer.add(scored([SOME, ALL_RIGHT]), 2)
    other.restore(buffer.state())
    assert other.rounds == 1 and uids(other.parts[0]) == "ab"


def test_state_of_another_number_of_ranks_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    buffer, other = empty_buffer(), empty_buffer()
    buffer.add(scored([SOME, ALL_RIGHT]), 2)
    with caplog.at_level(logging.WARNING):
        other.restore([*buffer.state(), {}])
    assert other.rounds == 0
    assert "saved by 2 ranks while a batch was being filled, this run has 1" in caplog.text


def test_empty_state_of_another_number_of_ranks_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    buffer = empty_buffer()
    buffer.restore([{}, {}])
    assert buffer.rounds == 0 and not caplog.records


# -- in a run ---------------------------------------------------------------------------------------------------------


class SomePrompts(BaseReward):
    """Every second answer to a third of the prompts is right, all answers to the others; whatever was sampled."""

    components = ("accuracy", "format")

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        scores = []
        for n, rollout in enumerate(rollouts):
            accuracy = float(seed_from(rollout.prompt.uid) % 3 > 0 or n % 2)
            scores.append(Score(accuracy + 0.1 * (n % 3), {"accuracy": accuracy, "format": float(n % 3)}))
        return scores

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError


class AllWrong(SomePrompts):
    """All wrong, with a format bonus that differs."""

    components = ("accuracy",)

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        return [Score(0.1 * (n % 3), {"accuracy": 0.0}) for n in range(len(rollouts))]


class Rounds(Callback):
    """What each pass of the loop trained on and sampled."""

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.trained: list[ScoredBatch] = []
        self.sampled: list[list[Rollout]] = []

    def setup(self, trainer, pl_module, stage) -> None:
        advantages, sample = pl_module.compute_advantages, pl_module.sample
        pl_module.compute_advantages = lambda batch: (self.trained.append(batch), advantages(batch))[1]
        pl_module.sample = lambda prompts: (self.sampled.append(r := sample(prompts)), r)[1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.open.append(bool(pl_module.group_buffer.rounds))


def dynamic(algorithm: type[RLModule] = DAPO, **options: object) -> RLModule:
    defaults = {"dynamic_sampling": DynamicSampling(max_rounds=8), "max_rollouts": 2, "rewards": [SomePrompts()]}
    return runs.module(algorithm, **(defaults | options))


def test_run_trains_on_full_batches_of_informative_groups(tmp_path: Path) -> None:
    module, rounds = dynamic(), Rounds()
    trainer = runs.trainer(tmp_path, callbacks=[rounds])
    trainer.fit(module, runs.data())
    assert any(rounds.open) and module.state.rollouts == 2  # a pass begins when the batch before it was full
    for batch in rounds.trained:
        assert len(batch) == 16
        assert module.group_buffer.informative(batch).all()
        assert len(batch.group_N.unique()) == 4
    assert trainer.callback_metrics["train/extra_rounds"] == sum(rounds.open[rounds.open.index(False) + 1 :])
    assert 0 < trainer.callback_metrics["train/informative_groups"] < 1  # of all that was sampled


def test_rounds_have_other_groups_and_other_samples(tmp_path: Path) -> None:
    """With one batch of prompts in the data set, every round asks the same prompts."""
    module = dynamic(dynamic_sampling=DynamicSampling(max_rounds=2), max_rollouts=1, rewards=[AllWrong()])
    rounds = Rounds()
    runs.trainer(tmp_path, callbacks=[rounds]).fit(module, runs.data(batch_size=4, train_size=4))
    assert len(rounds.sampled) == 3
    groups = [{r.group for r in sampled} for sampled in rounds.sampled]
    assert len(set.union(*groups)) == 12
    texts = [sorted((r.prompt.uid, r.text) for r in sampled) for sampled in rounds.sampled]
    assert texts[0] != texts[1] and texts[1] != texts[2]


def test_update_without_an_informative_group_is_skipped_and_counted(tmp_path: Path) -> None:
    options = {"dynamic_sampling": DynamicSampling(max_rounds=1), "max_rollouts": 1, "rewards": [AllWrong()]}
    module, before = dynamic(**options), dynamic()
    before.configure_model()
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.state.rollouts == 1 and module.state.updates == 0
    assert trainer.callback_metrics["train/skipped_updates"] == 2  # both mini-batches
    assert trainer.callback_metrics["train/extra_rounds"] == 1
    assert trainer.callback_metrics["train/informative_groups"] == 0
    after = dict(module.policy.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.policy.named_parameters())


def test_gpg_fills_up_with_uninformative_groups(tmp_path: Path) -> None:
    module = dynamic(GPG, dynamic_sampling=DynamicSampling(max_rounds=8, min_informative=0.5), max_rollouts=1)
    rounds = Rounds()
    runs.trainer(tmp_path, callbacks=[rounds]).fit(module, runs.data())
    (batch,) = rounds.trained
    assert len(batch) == 16 and module.group_buffer.informative(batch).sum() >= 8


class SaveInTheMiddle(Callback):
    """Keeps the first checkpoint that is saved while a batch is being filled, after the first update."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.group_buffer.rounds and pl_module.state.updates and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_run_resumed_while_a_batch_was_being_filled_is_bit_identical(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = dynamic(max_rollouts=3)
    trainer = runs.trainer(tmp_path, callbacks=[SaveInTheMiddle(path)])
    trainer.fit(whole, runs.data(train_size=13))
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint[STATE]["group_buffer"][0]) >= 1
    resumed, rounds = dynamic(max_rollouts=3), Rounds()
    again = runs.trainer(tmp_path, callbacks=[rounds])
    again.fit(resumed, runs.data(train_size=13), ckpt_path=str(path))
    assert len(rounds.trained) < 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    expected = {name: x for name, x in trainer.callback_metrics.items() if name.startswith("train/")}
    assert {name: again.callback_metrics[name] for name in expected} == expected
