"""Batches that are read while the device works on those before."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from .loop import Batches

AHEAD = 4  # batches


@contextmanager
def reading_ahead(batches: Batches) -> Iterator[Batches]:
    """The same batches for a process that asks for one number after the other: a thread has up to AHEAD of them ready.

    What a batch raises comes when it is asked for.
    """
    reader = ThreadPoolExecutor(1, "batches")
    ready: deque[tuple[tuple[int, int], Future[object]]] = deque()

    def given(number: int, process: int) -> object:
        if not ready or ready[0][0] != (number, process):
            ready.clear()
        for later in range(number + len(ready), number + AHEAD + 1):
            ready.append(((later, process), reader.submit(batches, later, process)))
        return ready.popleft()[1].result()

    try:
        yield given
    finally:
        reader.shutdown(cancel_futures=True)
