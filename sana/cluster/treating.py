"""Things to workers that do the same with each, such as to write the caption of a picture: the engine of `generate --workers`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from .drawing import Run
from .faults import fault, tried
from .manifest import Entry
from .rows import Row
from .running import run_rows
from .workers import Workers

Thing = TypeVar("Thing")
Treat = Callable[[Thing], int]
TreatTogether = Callable[[Sequence[Thing]], Sequence[int | Exception]]


class Treater:
    """What a worker does. make, of the run's `model`: loads what is needed and gives a Treat, or a TreatTogether if `together`."""

    def __init__(self, run: Run, name: str) -> None:
        self.name = name
        self.treat = run.model["make"]()
        self.together = run.model["together"]

    def draw(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Entry]:
        things = [row.given for row in rows]
        found = self.treat(things) if self.together else (tried(self.treat, thing) for thing in things)
        for row, count in zip(rows, found, strict=True):
            if isinstance(count, Exception):
                yield fault(row, count, self.name)
            else:
                yield Entry(row.number, row.key(), prompt=row.prompt, settings=str(count), worker=self.name)


def treat_all(
    things: Sequence[tuple[Path, Thing]],
    make: Callable[[], Treat | TreatTogether],
    workers: Workers,
    what: str,
    *,
    together: bool = False,
) -> tuple[int, int]:
    """The sum of what `make()` gives of each thing, and of how many it gives an error, of which it tells with the path.

    make: can be sent to another process. what: is done, as the bar says it. together: hundreds of things go to a worker at a
    time, as one argument. Ctrl-C ends it after what is in flight. Raises ValueError as `connected` and `draw_rows` do.
    """
    rows = (Row(number, str(path), given=thing) for number, (path, thing) in enumerate(things))
    done = failed = 0

    def note(entry: Entry) -> None:
        nonlocal done, failed
        if entry.error is None:
            done += int(entry.settings)
        else:
            failed += 1
        bar.update()

    run = Run("", {"make": make, "together": together})
    with tqdm(total=len(things), desc=what, unit="picture") as bar:
        run_rows(rows, run, workers, bar, note, label=lambda entry: entry.prompt, drawer=Treater, shards=together)
    return done, failed
