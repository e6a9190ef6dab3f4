"""`sana generate --workers`: a file of prompts on many devices, into a folder that tells what is done."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

from tqdm import tqdm

from ..work_folder import NOTE, check_note, claim_folder
from .drawing import Run
from .manifest import Entry, Manifest
from .places import Folder, Place, open_place
from .rows import Row, read_rows
from .running import run_rows
from .stores import FOLDER_SIZE, key_of
from .workers import Workers

WORK = "drawing"  # what a place is for

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
        with tqdm(initial=manifest.count, unit="picture") as bar:

            def left() -> Iterator[Row]:
                Thread(target=_count, args=(prompts, batch_size, bar), daemon=True).start()  # now that Ray is there
                yield first
                yield from missing

            def note(entry: Entry) -> None:
                manifest.add(entry)
                bar.update(manifest.count - bar.n)

            shards = run.form == "webdataset"
            try:
                run_rows(
                    left(),
                    replace(run, is_noted=True),
                    workers,
                    bar,
                    note,
                    label=lambda entry: f"row {entry.row}",
                    shards=shards,
                )
            finally:
                manifest.flush()
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
        if row.fault is None:
            first = names.setdefault(key_of(row).casefold(), row.number)
            if first != row.number:
                row = replace(row, fault=f"its name {key_of(row)} is that of row {first}; give another")
        yield row


@contextmanager
def _claimed(place: Place, run: Run) -> Iterator[None]:
    """A place is for one run, in one process at a time as far as it knows locks, which an address does not."""
    note = _note(run)
    if isinstance(place, Folder):
        with claim_folder(place.root, note, WORK):
            yield
    else:
        if not place.exists(NOTE):
            place.write(NOTE, json.dumps(note, indent=2).encode())
        check_note(place.read(NOTE), note, run.out, WORK)
        yield


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
