"""`sana generate --workers`: a file of prompts on many devices, into a folder that tells what is done."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Thread

from tqdm import tqdm

from ..interruption import postponed
from ..work_folder import claim_folder
from .drawing import Run
from .engine import Workers, connected, draw_rows
from .manifest import Manifest
from .places import Folder, Place, open_place
from .rows import Row, read_rows
from .stores import FOLDER_SIZE

log = logging.getLogger(__name__)


def generate(prompts: Path, run: Run, workers: Workers, *, batch_size: int = 1, retry: bool = False) -> int:
    """Draw each row of a file that is not done; how many cannot be drawn. Ctrl-C ends it after what is in flight.

    batch_size: pictures of each row, with seeds one after the other. retry: rows that could not be drawn are tried again.
    Raises ValueError for an output of another run, and as `read_rows`, `connected` and `draw_rows` do.
    """
    next(read_rows(prompts))  # refuses a file before anything is started
    place = open_place(run.out)
    with _claimed(place, run):
        manifest = Manifest(place, retry=retry)
        rows = expanded(read_rows(prompts, _warn), batch_size, int(run.settings.get("seed", 0)))
        missing = (row for row in distinct(rows) if not manifest.has(row.number, row.key()))
        first = next(missing, None)
        if first is None:
            log.warning("Nothing is left to draw.")
            return _failed(manifest)
        with connected(workers), postponed() as stopped, tqdm(initial=manifest.count, unit="picture") as bar:
            Thread(target=_count, args=(prompts, batch_size, bar), daemon=True).start()
            try:
                drawn: Counter[str] = Counter()
                for entries in draw_rows(chain([first], missing), run, workers, stopped=lambda: _told(stopped(), bar)):
                    for entry in entries:
                        manifest.add(entry)
                        drawn[entry.worker or "none"] += 1
                        if entry.error is not None:
                            bar.write(f"row {entry.row}: {entry.error}", file=sys.stderr)
                    bar.update(manifest.count - bar.n)
                    bar.set_postfix_str(", ".join(f"{name} {count}" for name, count in sorted(drawn.items())))
            finally:
                manifest.flush()
            if stopped():
                raise KeyboardInterrupt
        return _failed(manifest)


def _failed(manifest: Manifest) -> int:
    if manifest.failed:
        count = len(manifest.failed)
        log.warning("Could not be drawn, as manifest/ tells: %d; --retry-failed tries them again.", count)
    return len(manifest.failed)


def expanded(rows: Iterator[Row], batch_size: int, seed: int) -> Iterator[Row]:
    """Several pictures of each row. seed: of the first, where a row tells none."""
    for row in rows:
        first = int(row.settings.get("seed", seed))
        for k in range(batch_size):
            name = f"{row.name}-{k + 1}" if row.name and batch_size > 1 else row.name
            settings = {**row.settings, "seed": first + k}
            yield replace(row, number=row.number * batch_size + k, name=name, settings=settings)


def distinct(rows: Iterator[Row]) -> Iterator[Row]:
    """A row has a fault if another of the same folder has its name."""
    names: dict[str, int] = {}
    for row in rows:
        if row.number % FOLDER_SIZE == 0:
            names = {}
        if row.name is not None and row.fault is None:
            first = names.setdefault(row.name.casefold(), row.number)
            if first != row.number:
                row = replace(row, fault=f"its name {row.name} is that of row {first}; give another")
        yield row


def _told(stopped: bool, bar: tqdm) -> bool:
    """Whether Ctrl-C was pressed, which is said in the place of what is drawn."""
    if stopped:
        bar.set_description("Stopping after the pictures in flight; Ctrl-C again stops at once")
    return stopped


def _claimed(place: Place, run: Run) -> AbstractContextManager[None]:
    """A folder is for one run, in one process at a time. An address knows no locks."""
    return claim_folder(place.root, _note(run), "drawing") if isinstance(place, Folder) else nullcontext()


def _note(run: Run) -> Mapping[str, str]:
    return {
        "files": run.files,
        "lora": run.lora or "",
        "format": run.form,
        **{name: str(value) for name, value in sorted(run.settings.items())},
    }


def _warn(column: str) -> None:
    log.warning("The column %r is not known and does not count.", column)


def _count(prompts: Path, batch_size: int, bar: tqdm) -> None:
    """Tell a bar how many pictures there will be, while the first ones are drawn already."""
    with suppress(ValueError, OSError):  # of which the one who draws tells
        bar.total = batch_size * sum(1 for _ in read_rows(prompts))
