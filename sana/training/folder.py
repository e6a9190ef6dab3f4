"""The work folder of a training: which training it is of, that no other works in it meanwhile, and what is computed once."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..work_folder import claim_folder
from .loop import process_state


@contextmanager
def claim(folder: Path, run: Mapping[str, str], option: str = "--out") -> Iterator[None]:
    """Make a work folder, note what it is for, remove what killed processes have left in it, and hold it until the end.

    option: of the shell, by which the folder is given. Of several processes of one training the main one does so for all.
    Raises ValueError if the folder is for something else, if another training holds it, or if it is no folder.
    """
    with ExitStack() as held:
        refusal: list[str | None] = [None]
        if process_state().is_main_process:
            try:
                held.enter_context(claim_folder(folder, run, "training", option))
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
