"""Pictures to workers that do the same with each, such as to write its caption: the engine of `generate --workers`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..interruption import postponed
from .drawing import Run, fault
from .engine import Workers, connected, draw_rows
from .manifest import Entry
from .rows import Row

Treat = Callable[[Path], int]


class Treater:
    """What a worker does. make, of the run's `model`: loads what is needed and gives a function of a picture, which counts."""

    def __init__(self, run: Run, name: str) -> None:
        self.name = name
        self.treat: Treat = run.model["make"]()

    def draw(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Entry]:
        for row in rows:
            try:
                count = self.treat(Path(row.prompt))
            except (ValueError, OSError, RuntimeError) as error:
                yield fault(row, str(error) or type(error).__name__, self.name)
            else:
                yield Entry(row.number, row.key(), prompt=row.prompt, settings=str(count), worker=self.name)


def treat_all(pictures: Sequence[Path], make: Callable[[], Treat], workers: Workers, what: str) -> tuple[int, int]:
    """The sum of what `make()(picture)` gives, and how many pictures failed, of which it tells. Ctrl-C ends it after what is in flight.

    make: can be sent to another process. what: is done, as the bar says it. Raises ValueError as `connected` and `draw_rows` do.
    """
    rows = (Row(number, str(path.absolute())) for number, path in enumerate(pictures))
    done = failed = 0
    with connected(workers), postponed() as stopped, tqdm(total=len(pictures), desc=what, unit="picture") as bar:
        for entries in draw_rows(rows, Run("", {"make": make}), workers, drawer=Treater, stopped=stopped):
            for entry in entries:
                if entry.error is None:
                    done += int(entry.settings)
                else:
                    failed += 1
                    bar.write(f"{entry.prompt}: {entry.error}", file=sys.stderr)
            bar.update(len(entries))
        if stopped():
            raise KeyboardInterrupt
    return done, failed
