"""The work folder of a training: which training it is of, that no other works in it meanwhile, and what is computed once."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..reading import parse_json, read_bytes
from ..saving import lock, remove_leftovers, write_json
from .loop import process_state

NOTE, LOCK = "run.json", "training.lock"
LONGEST_NOTE = 2**16  # bytes; paths are far shorter

log = logging.getLogger(__name__)


@contextmanager
def claim(folder: Path, run: Mapping[str, str]) -> Iterator[None]:
    """Make a work folder, note what it is for, remove what killed processes have left in it, and hold it until the end.

    Of several processes of one training the main one does so for all. Raises ValueError if the folder is for something else,
    if another training holds it, or if it is no folder.
    """
    with ExitStack() as held:
        refusal: list[str | None] = [None]
        if process_state().is_main_process:
            try:
                _enter(folder, run, held)
            except (ValueError, OSError) as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)  # the others would wait for a main process that has given up
        if refusal[0] is not None:
            raise ValueError(refusal[0])
        yield


def read_computed(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """Tensors that were computed once and kept in a file. shapes: of each by its name, None where any length will do.

    Raises ValueError for a file that holds something else.
    """
    try:
        if not path.is_file():  # a named pipe has no end
            raise OSError
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys() if name in shapes}
    except (SafetensorError, OSError):
        found = {}
    if not all(name in found and _fits(found[name], shape) for name, shape in shapes.items()):
        raise ValueError(f"{path} is damaged or of another program; delete it, and the same command computes it again")
    return found


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return len(shape) == tensor.ndim and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))


def _enter(folder: Path, run: Mapping[str, str], held: ExitStack) -> None:
    """Does what `claim` says, in the main process; `held` holds the folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --out, a folder")
    folder.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((folder / LOCK).open("wb"))
    try:
        if not lock(file):
            raise ValueError(f"another training is at work in {folder}; wait until it ends, or give another --out")
    except OSError:
        log.warning("%s is on a disk without locks; do not start a second training in it.", folder)
    remove_leftovers(folder, everywhere=True)
    note = folder / NOTE
    if not note.exists():
        write_json(note, run)
    known = _read_note(note)
    if known != run:
        told = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(f"{folder} holds another training ({told}); give another --out")


def _read_note(note: Path) -> dict[str, str]:
    try:
        content = read_bytes(note, LONGEST_NOTE)
        known = parse_json(content) if len(content) <= LONGEST_NOTE else None
    except (ValueError, OSError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise ValueError(
            f"{note} does not tell what {note.parent} is for; if it is for this training, move that file away and "
            "give the same command again, or else give another --out"
        )
    return known
