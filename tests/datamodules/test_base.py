"""Loaders of the base class: arithmetic of the batch size, shares of the ranks, missing splits."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

from rllava_pl.datamodules import BaseDataModule, DigitsDataModule, PromptDataModule, SyntheticVisionDataModule
from rllava_pl.types import Prompt


class Rows(BaseDataModule):
    def setup(self, stage: str) -> None:
        self.train_prompts = self.val_prompts = self.test_prompts = [Prompt(f"r:{k}", ()) for k in range(5)]


def on_rank(rank: int, ranks: int, **options: int) -> Rows:
    """A data module as on one of several data-parallel ranks."""
    data = Rows(**options)
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank})
    data.trainer = SimpleNamespace(strategy=strategy, fit_loop=None)
    data.setup("fit")
    return data


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_over_ranks_counts_every_row_once_in_equally_many_batches(ranks):
    loaders = [on_rank(rank, ranks, val_batch_size=2).val_dataloader() for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert len({len(part) for part in batches}) == 1
    seen = [prompt.uid for part in batches for batch in part for prompt in batch]
    assert sorted(seen) == [f"r:{k}" for k in range(5)]


def test_training_over_ranks_is_disjoint_with_full_batches():
    parts = [list(on_rank(rank, 2, batch_size=2).train_dataloader()) for rank in range(2)]
    assert [[len(batch) for batch in part] for part in parts] == [[2], [2]]
    seen = [prompt.uid for part in parts for batch in part for prompt in batch]
    assert len(set(seen)) == 4


def test_data_without_a_trainer_is_for_one_rank():
    data = Rows(batch_size=5)
    data.setup("fit")
    assert [len(batch) for batch in data.train_dataloader()] == [5]


def test_too_few_training_rows_are_refused_with_the_arithmetic():
    message = (
        r"batch_size 3 x 2 ranks = 6 prompts a rollout, but the training set has 5; set batch_size to 2 or less, or add"
    )
    with pytest.raises(ValueError, match=message):
        on_rank(0, 2, batch_size=3).train_dataloader()


def test_data_without_validation_rows_has_no_validation_loader():
    assert BaseDataModule().val_dataloader() == []


def test_test_loader_without_test_rows_is_refused():
    with pytest.raises(ValueError, match="Rows has no test prompts"):
        Rows().predict_dataloader()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; a batch needs at least 1 prompt"),
        ({"val_batch_size": -1}, "val_batch_size is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_wrong_option_is_refused_at_construction(option, message):
    with pytest.raises(ValueError, match=message):
        BaseDataModule(**option)


@pytest.mark.parametrize("kind", [DigitsDataModule, PromptDataModule, SyntheticVisionDataModule])
def test_signature_shows_own_and_common_options(kind: type[BaseDataModule]) -> None:
    names = list(inspect.signature(kind).parameters)
    assert names[-4:] == ["batch_size", "val_batch_size", "num_workers", "seed"] and "loader_options" not in names
    assert kind(batch_size=3, seed=5).batch_size == 3
    with pytest.raises(TypeError, match="batch_sise"):
        kind(batch_sise=3)


def test_signature_of_a_module_with_fixed_options_has_no_others() -> None:
    class Fixed(BaseDataModule):
        def __init__(self, path: str) -> None:
            super().__init__(batch_size=2)

    assert list(inspect.signature(Fixed).parameters) == ["path"]
