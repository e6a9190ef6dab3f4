"""What is to be drawn, under which names: prompts of a file, pictures that exist already, and what tells them apart."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from .checkpoints.files import read_tensors
from .checkpoints.gguf_container import is_gguf
from .reading import check_file, parse_json
from .saving import replacing

CHUNK = "sana"  # of a PNG, the text that holds its record
PARAMETERS = "parameters"  # the text that viewers and galleries look for
SAMPLE = 64  # numbers of each tensor that tell a model from another; training changes all of them
ENHANCED_FROM = "enhanced_from"  # in a record: the prompt that was given, of which the drawn one was written
PLACES = 1000  # of a GGUF file, where so many bytes are taken

Record = Mapping[str, object]  # what a picture was drawn with, as JSON values; see `Plan.record`


class Job(NamedTuple):
    """Pictures of one prompt that are sampled together; the k-th has seed + k."""

    prompt: str
    seed: int
    batch_size: int


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. A line ends at a line feed, and at no other character.

    Raises ValueError for what is no file, is no UTF-8 or holds no prompt, and OSError for a file that cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a text file with one prompt on each line")
    try:
        check_file(path)
        text = path.read_bytes().decode("utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8; write one prompt on each line") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); give a text file with one prompt on each line") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one on each line")
    return prompts


def missing_jobs(jobs: Iterable[Job], out: Path, record: Record, enhanced: bool = False) -> Iterator[Job]:
    """The jobs without the pictures that exist under any of the names of `out`.

    One picture stands for one that is asked for. record: of any picture of these jobs, but for its prompt and seed.
    enhanced: whether better prompts are to be written of those of the jobs.
    """
    given = ENHANCED_FROM if enhanced else "prompt"
    existing = Counter(_key(found) for path in _outputs(out) if (found := read_record(path)) is not None)

    def is_missing(prompt: str, seed: int) -> bool:
        key = _key({**record, given: prompt, "seed": seed})
        if not existing[key]:
            return True
        existing[key] -= 1
        return False

    for job in jobs:
        seeds = [seed for seed in range(job.seed, job.seed + job.batch_size) if is_missing(job.prompt, seed)]
        if len(seeds) == job.batch_size:
            yield job
        else:
            yield from (Job(job.prompt, seed, 1) for seed in seeds)


def names(out: Path, several: bool) -> Iterator[Path]:
    """`out`, unless there are several pictures, and then without an end out-0001.png, out-0002.png and so on."""
    if not several:
        yield out
    yield from (out.with_stem(f"{out.stem}-{k:04d}") for k in count(1))


def free_names(out: Path, several: bool) -> Iterator[Path]:
    """Those of `names` at which there is nothing at the moment when one is asked for."""
    return (path for path in names(out, several) if not os.path.lexists(path))


def check_free(out: Path, pictures: int) -> None:
    """Raises ValueError if something exists under a name that so many pictures would get."""
    for path in islice(names(out, pictures > 1), pictures):
        if os.path.lexists(path):
            raise ValueError(
                f"{path} exists already; give --resume to draw only what is missing, --overwrite to replace it, "
                "or another --out"
            )


def _outputs(out: Path) -> Iterator[Path]:
    """What exists under any name of `names`, in no order."""
    name = re.compile(rf"{re.escape(out.stem)}(-\d{{4,}})?{re.escape(out.suffix)}")
    with os.scandir(out.parent) as entries:
        yield from (Path(entry.path) for entry in entries if name.fullmatch(entry.name))


def _key(record: Record) -> int:
    """A number in the place of a record, so that a folder of a million pictures takes no memory to speak of.

    A prompt that was written does not count: what it was written from does.
    """
    if ENHANCED_FROM in record:
        record = {**record, "prompt": ""}
    text = json.dumps(record, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_record(path: Path) -> Record | None:
    """What a picture was drawn with, from the beginning of its file; None for what is no picture of this package."""
    try:
        check_file(path)
        with path.open("rb") as file:
            return png_record(file)
    except (OSError, ValueError):
        return None


def png_record(file: BinaryIO) -> Record | None:
    """The record of a PNG; None for what is none of this package."""
    try:
        with PngImageFile(file) as picture:  # not Image.open, which refuses our largest
            found = parse_json(picture.info[CHUNK])
    except (OSError, SyntaxError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def write_png(picture: Image.Image, path: Path, record: Record, parameters: str) -> None:
    """Write a picture as `save_png` does, as a whole or not at all."""
    with replacing(path) as unfinished:
        save_png(picture, unfinished, record, parameters)


def save_png(picture: Image.Image, file: Path | BinaryIO, record: Record, parameters: str) -> None:
    """A picture with its record, and with what viewers read, see `infotext.py`."""
    text = PngInfo()
    text.add_text(CHUNK, json.dumps(record, ensure_ascii=False))
    text.add_text(PARAMETERS, parameters)
    picture.save(file, format="PNG", pnginfo=text)


def fingerprint(models: Mapping[str, Path], files: Iterable[Path]) -> str:
    """16 digits that change with the weights of models and with the bytes of files.

    models: by their components, such as "vae". Raises CheckpointError and OSError for what cannot be read.
    """
    digest = hashlib.sha256()
    for component, path in models.items():
        if is_gguf(path):
            digest.update(f"{component} {path.stat().st_size}".encode() + b"".join(_samples(path)))
            continue
        for name, tensor in sorted(read_tensors(path, component).tensors.items()):
            digest.update(f"{component} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1)[:SAMPLE].contiguous().view(torch.uint8).numpy().tobytes())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _samples(path: Path) -> Iterator[bytes]:
    """Bytes from all over a file, which need no package to be read."""
    with path.open("rb") as file:
        for place in range(0, path.stat().st_size, path.stat().st_size // PLACES + 1):
            file.seek(place)
            yield file.read(SAMPLE)
