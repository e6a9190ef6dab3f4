"""Workers as a command shows them: a bar, what went wrong as it comes, and Ctrl-C."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable

from tqdm import tqdm

from ..interruption import postponed
from .drawing import Drawer, Run
from .engine import connected, draw_rows
from .manifest import Entry
from .rows import Row
from .workers import Workers


def run_rows(
    rows: Iterable[Row],
    run: Run,
    workers: Workers,
    bar: tqdm,
    note: Callable[[Entry], object],
    *,
    label: Callable[[Entry], str],
    drawer: type = Drawer,
    shards: bool = False,
) -> None:
    """Give the entry of each row to `note`, as they come. Ctrl-C ends it after what is in flight, by a KeyboardInterrupt.

    bar: shows what each worker has done; `note` moves it. label: what a row is called where its error is told. drawer, shards:
    as for `draw_rows`. Raises ValueError as `connected` and `draw_rows` do.
    """
    done: Counter[str] = Counter()
    with connected(workers), postponed() as stopped:
        for entries in draw_rows(
            rows, run, workers, drawer=drawer, shards=shards, stopped=lambda: _told(stopped(), bar)
        ):
            for entry in entries:
                note(entry)
                done[entry.worker or "none"] += 1
                if entry.error is not None:
                    bar.write(f"{label(entry)}: {entry.error}", file=sys.stderr)
            bar.set_postfix_str(", ".join(f"{name} {count}" for name, count in sorted(done.items())))
        if stopped():
            raise KeyboardInterrupt


def _told(stopped: bool, bar: tqdm) -> bool:
    """Whether Ctrl-C was pressed, which is said in the place of what is done."""
    if stopped:
        bar.set_description(f"Stopping after the {bar.unit}s in flight; Ctrl-C again stops at once")
    return stopped
