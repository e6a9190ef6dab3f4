"""What a worker does: rows to pictures. It knows nothing of other workers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from ..checkpoints.lora import read_strength
from ..images import read_picture
from ..infotext import infotext, shown_files
from ..jobs import Record, png_record, save_png
from ..pipeline import SanaPipeline
from ..plan import Plan, Settings
from ..work_folder import NOTE
from .faults import fault, tried
from .manifest import Entry, as_json
from .places import open_place
from .rows import Row
from .stores import Batch, Files, Shards

STORES = {"png": Files, "webdataset": Shards}  # by --format
TEXTS_KEPT = 16
PICTURES = ("image", "mask", "control_image")


@dataclass(frozen=True)
class Run:
    """What all rows share."""

    out: str  # folder or address
    model: Mapping[str, object]  # arguments of `SanaPipeline.load`
    lora: str | None = None  # as in a row
    settings: Mapping[str, object] = field(default_factory=dict)  # as in a row
    files: str = ""  # a fingerprint of all files that are read
    read: Callable[[], str] | None = None  # gives that fingerprint, on the machine where it is called
    form: str = "png"  # of STORES
    is_noted: bool = False  # whether the output has a note of what it is for, by which a worker knows the place


class Drawer:
    """One model on one device. name: of the worker. Raises ValueError for another output or other files than those of the
    command, and as `SanaPipeline.load` does.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.name = name
        place = open_place(run.out)
        if run.is_noted and not place.exists(NOTE):
            raise ValueError(f"{run.out} is another place for {name}; give a folder or an address that all share")
        self.store = STORES[run.form](place)
        self._lora: str | None = None
        self._pipeline: SanaPipeline | None = None
        self.pipeline(run.lora)
        if run.read and run.read() != run.files:
            raise ValueError(
                f"a model, a LoRA or a picture is another one for {name}; copy the same files to all machines"
            )

    def pipeline(self, lora: str | None) -> SanaPipeline:
        """With these LoRAs; the last one is kept."""
        if self._pipeline is None or lora != self._lora:
            self._pipeline = None  # before there is another
            loras = [read_strength(text) for text in (lora or "").split(";") if text]
            self._pipeline, self._lora = SanaPipeline.load(**self.run.model, loras=loras), lora
            self._shown = shown_files(self.run.model["model"], loras)
            self._pipeline.texts_kept = TEXTS_KEPT
        return self._pipeline

    def draw(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Entry]:
        """The entries of rows, as far as possible in order; a picture that exists already is not drawn again.

        alone: it is one row, at which workers have ended. The pictures are sure to be there when all entries are.
        Raises PlaceError if the output cannot be read or written.
        """
        with self.store.batch(rows, alone=alone) as batch:
            for lora, together in _grouped(rows, self.run.lora):
                pipeline = tried(self.pipeline, lora)
                for row in together:
                    found = pipeline
                    if not isinstance(pipeline, Exception):
                        found = tried(self._draw, pipeline, row, batch)
                    if isinstance(found, Exception):
                        batch.drop(row)
                        found = fault(row, found, self.name)
                    yield found

    def _draw(self, pipeline: SanaPipeline, row: Row, batch: Batch) -> Entry:
        """By itself, so that its numbers have nothing to do with those of other rows."""
        if row.fault is not None:
            raise ValueError(row.fault)
        plan = pipeline.plan(row.prompt, self._settings(row))
        record = self._record(row, plan)
        content = batch.get(row)
        seconds = None
        if content is None or png_record(BytesIO(content)) != record:
            start = time.perf_counter()
            ((_, (picture,)),) = pipeline.draw([plan])
            buffer = BytesIO()
            save_png(picture, buffer, record, infotext(plan, 0, pipeline.identity, self._shown))
            content = buffer.getvalue()
            batch.put(row, content, record)
            seconds = time.perf_counter() - start
        return Entry(
            row=row.number,
            key=row.key(),
            name=row.name,
            prompt=row.prompt,
            seed=plan.seeds[0],
            settings=as_json(record),
            file=batch.file(row),
            sha256=sha256(content).hexdigest(),
            seconds=seconds,
            worker=self.name,
        )

    def _settings(self, row: Row) -> Settings:
        given = {**self.run.settings, **row.settings}
        given.update((name, read_picture(Path(str(given[name])))) for name in PICTURES if name in given)
        return Settings(**given)

    def _record(self, row: Row, plan: Plan) -> Record:
        given = {**self.run.settings, **row.settings, "lora": row.lora or self.run.lora}
        read = {name: given[name] for name in (*PICTURES, "lora") if given.get(name)}
        return {**plan.record(), **read, "files": self.run.files}


def _grouped(rows: Sequence[Row], common: str | None) -> Iterator[tuple[str | None, list[Row]]]:
    """By their LoRAs."""
    groups: dict[str | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.lora or common, []).append(row)
    yield from groups.items()
