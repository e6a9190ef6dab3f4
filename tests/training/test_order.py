"""Which pictures come when."""

from collections import Counter

import numpy as np
import pytest

from sana.training.order import Order

BUCKETS = [np.arange(0, 50), np.arange(50, 53), np.arange(53, 100)]


def bucket_of(pictures: np.ndarray) -> int:
    (found,) = {int(np.searchsorted([50, 53], picture, side="right")) for picture in pictures}
    return found


def test_batches_are_of_one_size_which_comes_up_as_often_as_its_pictures() -> None:
    order = Order(BUCKETS)
    seen = Counter(bucket_of(order.batch(number, 0, size=5, seed=3)[0]) for number in range(20 * 100))
    assert sum(seen.values()) == 2000
    for bucket, share in ((0, 0.5), (1, 0.03), (2, 0.47)):
        # Of 20 batches a round, each size has its share rounded up or down: within four standard deviations
        assert abs(seen[bucket] - 2000 * share) < 4 * (100 * 0.25) ** 0.5
    assert seen[1] > 0


def test_a_round_has_each_picture_once() -> None:
    order = Order([np.arange(60)])
    for turn in range(3):
        found = [order.batch(turn * 10 + place, 0, size=6, seed=1) for place in range(10)]
        assert sorted(np.concatenate([pictures for pictures, _ in found])) == [*range(60)]
        assert {int(each) for _, turns in found for each in turns} == {turn}
    first, second = (order.batch(number, 0, size=6, seed=1)[0].tolist() for number in (0, 10))
    assert first != second


def test_processes_see_different_pictures_of_one_size() -> None:
    order = Order([np.arange(0, 40), np.arange(40, 53)], processes=3)
    seen = Counter()
    for number in range(40):
        parts = [order.batch(number, process, size=4, seed=0)[0] for process in range(3)]
        together = np.concatenate(parts)
        assert len({*together.tolist()}) == 12
        assert len({picture >= 40 for picture in together}) == 1
        seen.update(together.tolist())
    assert {*seen} == {*range(53)}


def test_few_pictures_fill_a_batch_evenly() -> None:
    pictures, turns = Order([np.array([7, 8, 9])]).batch(2, 0, size=7, seed=0)
    assert sorted(Counter(pictures.tolist()).values()) == [2, 2, 3]
    assert turns.tolist() == [2, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize("number", [0, 1, 19, 20, 1_000_003])
def test_a_batch_depends_on_its_number_and_the_seed_alone(number: int) -> None:
    def batch(seed: int = 5) -> list[int]:
        return Order(BUCKETS, 2).batch(number, 1, size=3, seed=seed)[0].tolist()

    assert batch() == batch() and batch() != batch(seed=6)
