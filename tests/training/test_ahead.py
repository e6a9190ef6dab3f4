"""Batches that are read ahead are those that were asked for."""

import threading

import pytest

from sana.training.ahead import AHEAD, reading_ahead


def test_batches_are_ready_before_they_are_asked_for_and_never_many() -> None:
    asked: list[int] = []
    enough = threading.Event()

    def batch(number: int, process: int) -> tuple[int, int]:
        asked.append(number)
        if number == 7 + AHEAD:
            enough.set()
        return number, process

    with reading_ahead(batch) as batches:
        assert batches(7, 1) == (7, 1)
        assert enough.wait(10) and asked == [*range(7, 8 + AHEAD)]
        assert [batches(number, 1) for number in (8, 9)] == [(8, 1), (9, 1)]
        assert [batches(number, 1) for number in (3, 4)] == [(3, 1), (4, 1)]  # from elsewhere
        assert batches(5, 0) == (5, 0)
    assert len(asked) <= 1 + 2 + 2 + 1 + 3 * AHEAD


def test_an_error_comes_in_the_place_of_its_batch() -> None:
    def batch(number: int, process: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return number

    with pytest.raises(KeyboardInterrupt), reading_ahead(batch) as batches:
        assert [batches(number, 0) for number in (0, 1)] == [0, 1]
        batches(2, 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
