"""The order of examples is a function of the step."""

import itertools
from collections import Counter

import pytest

from hf_guided.data import StepBatchSampler


def take(sampler: StepBatchSampler, num_steps: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, num_steps))


def test_every_epoch_sees_every_example_once_in_another_order():
    keys = [key for batch in take(StepBatchSampler(10, batch_size=4, seed=0), 5) for key in batch]
    assert [epoch for _, epoch in keys] == [0] * 10 + [1] * 10
    first, second = [index for index, _ in keys[:10]], [index for index, _ in keys[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != [index for batch in take(StepBatchSampler(10, 10, seed=1), 1) for index, _ in batch]


@pytest.mark.parametrize("num_examples", [3, 10, 1000])
def test_a_restart_equals_the_uninterrupted_run(num_examples):
    whole = take(StepBatchSampler(num_examples, 4, seed=5, num_processes=2, process_index=1), 12)
    for start in range(12):
        restarted = StepBatchSampler(num_examples, 4, 5, num_processes=2, process_index=1, start_step=start)
        assert take(restarted, 12 - start) == whole[start:]


def test_processes_share_the_stream_of_one():
    alone = take(StepBatchSampler(10, batch_size=12, seed=3), 5)
    shares = [take(StepBatchSampler(10, 4, 3, num_processes=3, process_index=p), 5) for p in range(3)]
    assert [[*first, *second, *third] for first, second, third in zip(*shares, strict=True)] == alone


def test_a_batch_larger_than_the_dataset():
    (batch,) = take(StepBatchSampler(3, batch_size=8, seed=0), 1)
    assert Counter(epoch for _, epoch in batch) == {0: 3, 1: 3, 2: 2}
    assert len(set(batch)) == 8


def test_num_steps_ends_the_stream():
    sampler = StepBatchSampler(10, 4, seed=0, start_step=7, num_steps=3)
    assert list(sampler) == list(sampler) == take(StepBatchSampler(10, 4, seed=0), 10)[7:]


def test_errors():
    with pytest.raises(ValueError, match="Batches of 4 cannot be drawn from 0 examples"):
        StepBatchSampler(0, 4, seed=0)
    with pytest.raises(ValueError, match="process_index 2 must be 0 to 1"):
        StepBatchSampler(10, 4, seed=0, num_processes=2, process_index=2)
