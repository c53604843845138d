"""Order and sharding as functions of counters; state of the loader without a trainer."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from rllava_pl.datamodules import PADDING, BaseDataModule, PromptLoader, PromptSampler
from rllava_pl.datamodules.loader import PromptDataset, separate_generator
from rllava_pl.types import Prompt, PromptBatch

ROWS = [Prompt(f"r:{k}", ()) for k in range(10)]


def training_loader(
    batch_size: int = 2, ranks: int = 1, rank: int = 0, seed: int = 0, rows: int = 10, workers: int = 0
):
    dataset = PromptDataset(ROWS[:rows])
    sampler = PromptSampler(dataset, ranks, rank, shuffle=True, seed=seed, drop_last=True)
    return PromptLoader(
        dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=PromptBatch, drop_last=True
    )


def uids(batches) -> list[list[str]]:
    return [[prompt.uid for prompt in batch] for batch in batches]


def test_order_differs_by_epoch_and_seed_but_shows_the_same_rows():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = PromptSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(each) == list(range(50)) for each in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert order(0, 1) == orders[1]


def test_rows_without_shuffle_keep_their_order():
    sampler = PromptSampler(range(4), shuffle=False)
    sampler.set_epoch(3)
    assert list(sampler) == [0, 1, 2, 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_ranks_share_one_order_and_drop_the_remainder(ranks):
    whole = list(PromptSampler(range(11), seed=5))
    parts = [list(PromptSampler(range(11), ranks, rank, seed=5)) for rank in range(ranks)]
    assert [len(part) for part in parts] == [11 // ranks] * ranks
    kept = 11 // ranks * ranks
    assert [index for step in zip(*parts, strict=True) for index in step] == whole[:kept]


def test_evaluation_pads_short_ranks_and_repeats_no_row():
    # 5 rows on 3 ranks: 0 3 | 1 4 | 2 and nothing
    parts = [list(PromptSampler(range(5), 3, rank, shuffle=False, drop_last=False)) for rank in range(3)]
    assert parts == [[0, 3], [1, 4], [2, PADDING]]


def test_fewer_rows_than_ranks_are_padded_or_dropped():
    parts = [list(PromptSampler(range(1), 3, rank, shuffle=False, drop_last=False)) for rank in range(3)]
    assert parts == [[0], [PADDING], [PADDING]]


def test_global_batch_does_not_depend_on_the_number_of_ranks():
    one = uids(training_loader(batch_size=4))
    two = [uids(training_loader(batch_size=2, ranks=2, rank=rank)) for rank in range(2)]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [1, 3, 4])
def test_state_points_at_the_next_batch(done, workers):
    whole = uids(training_loader())
    first = training_loader(workers=workers)
    batches = iter(first)
    for _ in range(done):
        next(batches)
    state = first.state_dict()
    assert state == {"epoch": 0, "position": done, "prompts_per_batch": 2, "rows": 10, "seed": 0}
    second = training_loader(workers=workers)
    second.load_state_dict(state)
    assert second.state_dict() == state  # nothing was handed out in between
    assert uids(second) == whole[done:]
    assert uids(second) == whole, "the position counts once"


def test_second_interruption_of_an_epoch_resumes_at_the_next_batch():
    whole = uids(training_loader())
    loader = training_loader()
    for count in (2, 1):
        batches = iter(loader)
        for _ in range(count):
            next(batches)
        state, loader = loader.state_dict(), training_loader()
        loader.load_state_dict(state)
    assert uids(loader) == whole[3:]


def test_resume_after_a_finished_epoch_starts_the_next_one():
    first = training_loader()
    list(first)
    second = training_loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    first.sampler.set_epoch(1)
    assert uids(second) == uids(first)


def test_length_after_a_resume_is_that_of_the_epoch():
    loader = training_loader()
    loader.load_state_dict({"epoch": 0, "position": 3, "prompts_per_batch": 2, "rows": 10, "seed": 0})
    assert len(loader) == 5
    list(loader)
    assert len(loader) == 5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 3}, "prompts_per_batch was 2, is 3"),
        ({"ranks": 2}, "prompts_per_batch was 2, is 4"),
        ({"rows": 9}, "rows was 10, is 9"),
        ({"seed": 7}, "seed was 0, is 7"),
    ],
)
def test_resume_with_another_shape_is_refused(other, message):
    loader = training_loader()
    next(iter(loader))
    with pytest.raises(ValueError, match=f"cannot resume in epoch 0 after batch 1: {message}"):
        training_loader(**other).load_state_dict(loader.state_dict())


def test_half_the_batch_on_twice_the_ranks_resumes_exactly():
    one = training_loader(batch_size=4)
    whole = uids(one)
    next(iter(one))
    state = one.state_dict()
    parts = []
    for rank in range(2):
        loader = training_loader(batch_size=2, ranks=2, rank=rank)
        loader.load_state_dict(state)
        parts.append(uids(loader))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole[1:]]


def test_padding_is_dropped_from_batches():
    dataset = PromptDataset(ROWS)
    assert dataset[PADDING] is None
    assert len(PromptBatch([dataset[PADDING], dataset[3]])) == 1


def test_loading_does_not_advance_the_global_generator():
    loader = PromptLoader(PromptDataset(ROWS), collate_fn=PromptBatch, generator=separate_generator(0))
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_ignore_signals_to_all_processes():
    """As schedulers send it. The batches behind it arrive, and closing the loader still ends the workers."""
    data = BaseDataModule(val_batch_size=2, num_workers=2)
    data.val_prompts = ROWS
    batches = iter(data.val_dataloader())
    workers = batches._workers
    next(batches), next(batches)  # one of each worker: both have begun
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    assert sum(len(batch) for batch in batches) == 6
    del batches
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
