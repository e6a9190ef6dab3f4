"""What draws in the place of a model where only the way of rows counts."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence

from sana.cluster.drawing import Run
from sana.cluster.engine import _Queue
from sana.cluster.faults import fault
from sana.cluster.manifest import Entry
from sana.cluster.places import PlaceError
from sana.cluster.rows import Row
from sana.cluster.workers import Workers


class Stamp:
    """Does what its prompts say: "end" ends the process, "raise" raises, and a number of seconds is waited for."""

    def __init__(self, run: Run, name: str) -> None:
        self.name = name
        self.full = run.model.get("full")
        if run.model.get("broken") in (name, "all"):
            raise ValueError(f"{name} has no model; copy it there")

    def draw(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Entry]:
        if self.full == self.name:
            raise PlaceError("No space left on device")
        for row in rows:
            if row.prompt == "end":
                os._exit(1)
            if row.prompt == "raise":
                raise LookupError("as it was told\nand more")
            if row.fault is not None:
                yield fault(row, row.fault, self.name)
                continue
            time.sleep(float(row.prompt))
            yield Entry(row.number, row.key(), prompt=row.prompt, settings=str(os.getpid()), worker=self.name)


def draw_here(
    rows: Iterable[Row], run: Run, workers: Workers, *, drawer: type, shards: bool, **_: object
) -> Iterator[list[Entry]]:
    """What `draw_rows` gives, by one worker in this process."""
    worker, queue = drawer(run, "worker-1"), _Queue(rows, workers.count, shards=shards)
    while not queue.is_empty():
        yield list(worker.draw(queue.next().rows))
