"""Which pictures the batches of a training have: each about once a round, and no two processes the same at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Batches of pictures of one size, for several processes. Each depends on its number and the seed alone.

    buckets: for each size the numbers of its pictures, (n,), at least one.
    """

    buckets: Sequence[np.ndarray]
    processes: int = 1

    def batch(self, number: int, process: int, *, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The pictures of a batch, (size,), and how often each came up in batches before, about, (size,).

        All processes have pictures of the same size at a time, and no picture twice as long as there are enough. In a round,
        in which the batches have room for every picture, sizes come up as often as their pictures do, and each picture once but
        for the rounding to whole batches.
        """
        together = size * self.processes
        counts = np.array([len(bucket) for bucket in self.buckets])
        length = -(-int(counts.sum()) // together)  # batches of a round
        turn, place = divmod(number, length)
        rng = np.random.default_rng([seed, turn])
        ends = counts.cumsum() / counts.sum()
        # As many batches of each size as its share says, rounded up or down by chance, in random order.
        points = (np.arange(length) + rng.random()) / length
        chosen = rng.permutation(np.minimum(np.searchsorted(ends, points, side="right"), len(counts) - 1))
        bucket = int(chosen[place])
        before = int((chosen[:place] == bucket).sum())
        pictures = np.random.default_rng([seed, turn, bucket]).permutation(self.buckets[bucket])
        places = before * together + process * size + np.arange(size)
        return pictures[places % len(pictures)], turn + places // len(pictures)
