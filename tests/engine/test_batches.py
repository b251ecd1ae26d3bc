"""Batches: what an epoch holds, and reading ahead."""

import threading
import time
from itertools import chain

import numpy as np
import pytest

from engine.batches import in_order, read_ahead, shuffled


def epoch(count=10, size=4, *, drop_last=False, seed=0, number=1) -> list[list[int]]:
    batches = shuffled(count, size, drop_last=drop_last, seed=seed, epoch=number)
    return [batch.tolist() for batch in batches]


def test_an_epoch_holds_every_image_once():
    batches = epoch()
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(chain(*batches)) == list(range(10))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch() == epoch()
    assert epoch(number=2) != epoch()
    assert epoch(seed=1) != epoch()
    assert epoch(seed=1, number=2) != epoch(seed=2, number=1)


def test_drop_last():
    assert [len(batch) for batch in epoch(drop_last=True)] == [4, 4]
    assert [len(batch) for batch in epoch(8, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in epoch(3, drop_last=True)] == [3]  # never nothing at all
    left_out: set[int] = set()
    for number in range(1, 9):
        left_out |= set(range(10)) - set(chain(*epoch(drop_last=True, number=number)))
    assert len(left_out) > 4  # not always the same ones


def test_in_order():
    assert [batch.tolist() for batch in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert in_order(0, 2) == []


def read(indices: np.ndarray) -> list[np.ndarray]:
    return [indices * 10, indices + 1]


def test_reading_ahead_keeps_the_order():
    batches = in_order(23, 4)
    read_batches = list(read_ahead(batches, read))
    for indices, (first, second) in zip(batches, read_batches, strict=True):
        np.testing.assert_array_equal(first, indices * 10)
        np.testing.assert_array_equal(second, indices + 1)
    assert list(read_ahead([], read)) == []


def test_exactly_one_batch_is_read_ahead():
    """While the first is worked on, the second is read, and no third one fills the memory."""
    asked: list[int] = []
    second = threading.Event()

    def counted(indices: np.ndarray) -> list[np.ndarray]:
        asked.append(int(indices[0]))
        if len(asked) == 2:
            second.set()
        return [indices]

    batches = read_ahead(in_order(8, 1), counted)
    next(batches)
    assert second.wait(10)
    time.sleep(0.05)
    assert asked == [0, 1]
    assert len(list(batches)) == 7


def test_errors_of_the_reader_arrive():
    def broken(indices: np.ndarray) -> list[np.ndarray]:
        if indices[0] == 4:
            raise KeyError("four")
        return [indices]

    seen: list[list[np.ndarray]] = []
    with pytest.raises(KeyError, match="four"):
        seen.extend(read_ahead(in_order(9, 2), broken))
    assert len(seen) == 0 or seen[-1][0][0] == 2
