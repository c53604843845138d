"""Dynamic sampling: uninformative groups are replaced, within bounds, and nothing is lost at a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rllava_pl.functional.seeds import seed_from
from rllava_pl.loop.collection import Collection
from rllava_pl.modules import DAPO, GPG, RLModule
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Experience, Rollout, Score
from tests import runs
from tests.modules.cases import experience

ALL_RIGHT, ALL_WRONG, SOME = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def collection(max_refills: int = 3, share: float = 1.0) -> Collection:
    return Collection(max_refills, share, "accuracy")


def uids(batch: Experience) -> str:
    return "".join(r.prompt.uid for r in batch.rollouts[:: batch.group_size])


def test_without_refills_every_batch_is_taken_as_it_is() -> None:
    batch = experience([ALL_RIGHT, ALL_WRONG])
    assert collection(max_refills=0).add(batch, 2) is batch


def test_groups_all_right_or_all_wrong_are_replaced_and_the_batch_keeps_its_size() -> None:
    collected = collection()
    assert collected.add(experience([SOME, ALL_RIGHT, ALL_WRONG], uids="abc"), 3) is None
    assert collected.add(experience([ALL_WRONG, SOME, ALL_RIGHT], uids="def"), 3) is None
    assert collected.rounds == 2
    batch = collected.add(experience([SOME, SOME, SOME], uids="ghi"), 3)
    assert uids(batch) == "aeg" and batch.mask_NT.all()
    assert collected.rounds == 0


def test_a_shaped_reward_does_not_make_a_group_informative() -> None:
    """A format bonus that differs within a group leaves it all wrong."""
    batch = experience([ALL_WRONG, SOME], format_NG=0.1)
    assert collection().informative(batch).tolist() == [False, False, True, True]
    assert collection(max_refills=0).informative(batch).all()  # where nothing is filtered, the reward is what teaches
    assert collection().add(batch, 2) is None


def test_rounds_of_unequal_width_are_joined() -> None:
    collected = collection()
    collected.add(experience([SOME], uids="a"), 2)
    batch = collected.add(experience([SOME], uids="b", tokens=[5, 3]), 2)
    assert batch.lengths_N.tolist() == [2, 2, 5, 3]
    assert batch.response_ids_NT[0].tolist() == [5, 6, 0, 0, 0]


def test_after_the_last_refill_it_goes_on_with_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    collected = collection(max_refills=1)
    assert collected.add(experience([SOME, ALL_RIGHT], uids="ab"), 2) is None
    with caplog.at_level(logging.WARNING):
        batch = collected.add(experience([ALL_RIGHT, ALL_WRONG], uids="cd"), 2)
    assert uids(batch) == "a"
    assert "1 of 2 wanted groups are informative after 2 rounds of generation; going on with them" in caplog.text


def test_no_informative_group_at_all_leaves_a_silent_one() -> None:
    batch = collection(max_refills=1)
    batch.add(experience([ALL_RIGHT, ALL_WRONG]), 2)
    nothing = batch.add(experience([ALL_RIGHT, ALL_WRONG]), 2)
    assert len(nothing) == 2 and not nothing.mask_NT.any()


def test_a_share_of_informative_groups_is_filled_up_with_others() -> None:
    """60 % of 5 is 3: two are not enough."""
    collected = collection(share=0.6)
    assert collected.add(experience([SOME, ALL_RIGHT, ALL_WRONG, SOME, ALL_RIGHT], uids="abcde"), 5) is None
    batch = collected.add(experience([ALL_RIGHT, SOME, ALL_WRONG, SOME, SOME], uids="fghij"), 5)
    assert uids(batch) == "adgij"
    batch = collected.add(experience([SOME, ALL_RIGHT, SOME, SOME, ALL_WRONG], uids="abcde"), 5)
    assert uids(batch) == "abcde"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_refills is -1; use 0"):
        collection(max_refills=-1)
    with pytest.raises(ValueError, match="informative_share is 0; it is a part of the batch, above 0"):
        collection(share=0)
    with pytest.raises(ValueError, match="informative_component is 'iou'; the rewards have accuracy"):
        Collection(1, 1.0, "iou").add(experience([SOME]), 1)


class Coin(BaseReward):
    """Right or wrong by chance, for a third of the prompts; all right for the others, whatever the format bonus."""

    components = ("accuracy", "format")

    def score(self, rollout: Rollout) -> Score:
        drawn = seed_from(rollout.prompt.uid, *rollout.response_ids.tolist())
        lucky = seed_from(rollout.prompt.uid) % 3 > 0
        accuracy = 1.0 if lucky else float(drawn % 2)
        bonus = float(drawn % 5)
        return Score(accuracy + 0.1 * bonus, {"accuracy": accuracy, "format": bonus})


class Equal(BaseReward):
    """All wrong, with a format bonus that is not equal."""

    components = ("accuracy",)

    def score(self, rollout: Rollout) -> Score:
        return Score(0.1 * (int(rollout.response_ids.sum()) % 3), {"accuracy": 0.0})


class Rounds(Callback):
    """What each pass of the loop saw."""

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.trained: list[Experience] = []
        self.sampled: list[list[Rollout]] = []

    def setup(self, trainer, pl_module, stage) -> None:
        credit, sample = pl_module.credit, pl_module.sample
        pl_module.credit = lambda e: (self.trained.append(e), credit(e))[1]
        pl_module.sample = lambda requests: (self.sampled.append(r := sample(requests)), r)[1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.open.append(bool(pl_module.collection.rounds))


def dynamic(algorithm: type[RLModule] = DAPO, **options: object) -> RLModule:
    module = runs.module(algorithm, **({"max_refills": 8, "max_rollouts": 2} | options))
    module.rewards = [Coin()]
    return module


def test_a_run_trains_on_full_batches_of_informative_groups(tmp_path: Path) -> None:
    module, rounds = dynamic(), Rounds()
    trainer = runs.trainer(tmp_path, callbacks=[rounds])
    trainer.fit(module, runs.data())
    assert any(rounds.open) and module.rollout_index == 2  # a pass begins when the batch before it was full
    for batch in rounds.trained:
        assert len(batch) == 16
        assert module.collection.informative(batch).all()
        assert len(batch.group_N.unique()) == 4
    assert trainer.callback_metrics["train/refills"] == sum(rounds.open[rounds.open.index(False) + 1 :])
    assert 0 < trainer.callback_metrics["train/informative_groups"] < 1  # of all that was sampled


def test_rounds_have_groups_and_samples_of_their_own(tmp_path: Path) -> None:
    """With one batch of prompts in the data set, every round of a collection asks the same prompts."""
    module, rounds = dynamic(max_refills=2, max_rollouts=1), Rounds()
    module.rewards = [Equal()]
    runs.trainer(tmp_path, callbacks=[rounds]).fit(module, runs.data(batch_size=4, train_size=4))
    assert len(rounds.sampled) == 3
    groups = [{r.group for r in sampled} for sampled in rounds.sampled]
    assert len(set.union(*groups)) == 12
    texts = [sorted((r.prompt.uid, r.text) for r in sampled) for sampled in rounds.sampled]
    assert texts[0] != texts[1] and texts[1] != texts[2] and texts[0] != texts[2]


def test_without_an_informative_group_the_update_is_skipped_and_counted(tmp_path: Path) -> None:
    module, before = dynamic(max_refills=1, max_rollouts=1), dynamic()
    before.configure_model()
    module.rewards = [Equal()]
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.rollout_index == 1 and module.weight_version == 0
    assert trainer.callback_metrics["train/skipped_updates"] == 2  # both mini-batches
    assert trainer.callback_metrics["train/refills"] == 1
    assert trainer.callback_metrics["train/informative_groups"] == 0
    after = dict(module.policy.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.policy.named_parameters())


def test_gpg_fills_up_with_uninformative_groups(tmp_path: Path) -> None:
    module, rounds = dynamic(GPG, informative_share=0.5, max_rollouts=1), Rounds()
    runs.trainer(tmp_path, callbacks=[rounds]).fit(module, runs.data())
    (batch,) = rounds.trained
    assert len(batch) == 16 and module.collection.informative(batch).sum() >= 8


class SaveInTheMiddle(Callback):
    """Keeps the first checkpoint that is saved while a batch is being collected, after the first update."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.collection.rounds and pl_module.weight_version and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_run_resumed_in_the_middle_of_a_collection_is_bit_identical(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = dynamic(max_rollouts=3)
    runs.trainer(tmp_path, callbacks=[SaveInTheMiddle(path)]).fit(whole, runs.data(train_size=13))
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint["collection"][0]) >= 1
    resumed, rounds = dynamic(max_rollouts=3), Rounds()
    runs.trainer(tmp_path, callbacks=[rounds]).fit(resumed, runs.data(train_size=13), ckpt_path=str(path))
    assert len(rounds.trained) < 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_collection_belongs_to_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = collection()
    collected.add(experience([SOME, ALL_RIGHT]), 2)
    state = collected.state()
    with pytest.raises(ValueError, match=r"saved by 2 ranks while a batch was being collected, this run has 1"):
        collection().restore([*state, {}], 0)
    other = collection()
    other.restore(state, 0)
    assert other.rounds == 1 and uids(other.parts[0]) == "ab"
    empty = collection()
    empty.restore([{}, {}], 0)  # at a rollout boundary the number of ranks does not matter
    assert empty.rounds == 0
