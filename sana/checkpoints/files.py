"""Tensors out of files: safetensors, PyTorch pickles, folders of shards, and what stands beside them.

Files are mapped into memory, not read. Nothing here knows what the tensors mean.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..reading import MOST_JSON_BYTES, check_file, parse_json, read_bytes
from .archives import DAMAGE, STARTS, read_archive
from .pickles import RefusedPickle

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
SAFETENSORS = (".safetensors", ".sft")
SUFFIXES = (*SAFETENSORS, *PICKLES)
HEADER_PLACE = 8  # bytes before the header of safetensors, which tell its length; it is a JSON object
MOST_HEADER_BYTES = 2**22  # of safetensors; the largest release has 1,600 tensors and 0.2 MB
# What people have in the place of a checkpoint, by how it begins in small letters.
STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull, or download the file itself",
    b"<": "a web page; download the file itself",
    b"{": "JSON without tensors; give the file or folder that holds them",
    b"gguf": "GGUF, which SANA is not read from; use safetensors",
}
# What PyTorch writes into names of a network that was compiled, sharded or recomputed, not counted at their beginning,
# where it stands before every name, as any prefix does.
NAME_PARTS = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PLAIN_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # of a model, in a folder with other things
DIFFUSERS_CLASSES = ("SanaTransformer2DModel", "SanaControlNetModel", "AutoencoderDC")  # in their config.json
LONG_WORD = re.compile(r"(\S{500})\S+")  # in messages; paths are shorter
SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.|$)")  # of a stem; older files name their format behind it
LONGEST_MESSAGE = 2000  # characters
Mapped = Callable[[Path], Mapping[str, Tensor] | None]


class CheckpointError(ValueError):
    """A file that is not what was asked for. The message is one sentence: what was found, and what to do.

    It is one line of a length that can be read, whatever the names in the file are: what has no spaces is cut, and what is
    not printed is escaped, since names may command a terminal.
    """

    def __init__(self, message: str) -> None:
        cut = LONG_WORD.sub(r"\1...", " ".join(message.splitlines()))
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
        half = LONGEST_MESSAGE // 2
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}")


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one model, with what is written beside them."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors header
    config: dict[str, object] = field(default_factory=dict)  # of a `config.json` in the same folder
    siblings: frozenset[str] = frozenset()  # "fp16" of `name.fp16.safetensors` in the same folder as `name.safetensors`


def read_tensors(path: Path | str, component: str | None = None, *, mapped: Mapped | None = None) -> TensorFile:
    """Open a file, a folder with one model in one or several files, or a pipeline folder with `component` in it.

    mapped: gives the tensors of a sound safetensors file in another way than that of its library, or None. Raises
    CheckpointError for anything that holds no tensors, is incomplete, or needs code to be read, and FileNotFoundError if there
    is nothing at the path.
    """
    path = Path(path)
    path = path if path.name else path.resolve()  # "." has no name to be told
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint file or a folder of a diffusers model")
    if path.is_dir():
        return _read_folder(_component(path, component), mapped)
    shard = SHARD.search(path.stem)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{path.name} is one of {int(shard[1])} shards; give the folder that holds all of them")
    tensors, metadata = _read_file(path, mapped)
    tensors = unwrapped(tensors)
    return TensorFile(path, tensors, metadata, _read_config(path.parent), _siblings(path))


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names are without NAME_PARTS."""
    return {NAME_PARTS.sub("", name): tensor for name, tensor in tensors.items()}


def tensor_names(path: Path) -> dict[str, None]:
    """Names of the tensors in a file or folder, for a look at what it is; none if it cannot be read or is a pickle."""
    try:
        names: dict[str, None] = {}
        for file in weight_files(path):
            if file.suffix in SAFETENSORS:
                _check_header(file)
                with safe_open(file, framework="pt") as opened:
                    names.update(dict.fromkeys(NAME_PARTS.sub("", name) for name in opened.keys()))
        return names
    except (CheckpointError, SafetensorError, OSError):
        return {}


def weight_files(path: Path, component: str | None = None) -> list[Path]:
    """The files that `read_tensors` reads of a model. Raises CheckpointError for a folder without a whole one."""
    return _model_files(_component(path, component)) if path.is_dir() else [path]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object, or {} if there is no such file. Raises CheckpointError if the file is something else."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    return found if isinstance(found, dict) else {}


def _read_config(folder: Path) -> dict[str, object]:
    """The `config.json` of a folder; {} for one of another model of diffusers, which may lie beside files of ours."""
    config = read_json(folder / "config.json")
    return config if config.get("_class_name") in (None, *DIFFUSERS_CLASSES) else {}


def _component(folder: Path, component: str | None) -> Path:
    """Where it is, in a folder of a pipeline or of one model."""
    return folder / component if component is not None and (folder / component).is_dir() else folder


def _read_folder(folder: Path, mapped: Mapped | None) -> TensorFile:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    paths = _model_files(folder)
    for path in paths:
        found, header = _read_file(path, mapped)
        tensors.update(unwrapped(found))
        metadata.update(header)
    return TensorFile(folder, tensors, metadata, _read_config(folder), _siblings(paths[0]))


def _siblings(path: Path) -> frozenset[str]:
    """What stands behind the name of this file in those of others in its folder, before their suffix."""
    name = SHARD.sub("", path.stem) + "."
    if not os.access(path.parent, os.R_OK):
        return frozenset()
    others = (other for other in path.parent.iterdir() if other.suffix in SUFFIXES)
    stems = (SHARD.sub("", other.stem) for other in others)
    return frozenset(stem.removeprefix(name) for stem in stems if stem.startswith(name))


def _model_files(folder: Path) -> list[Path]:
    """The files of one model in a folder: all shards of the plainest name, safetensors before pickles.

    Folders may hold the same model several times: as `name.safetensors` and `name.fp16.safetensors`, or whole and in shards.
    """
    for suffixes in (SAFETENSORS, PICKLES):
        groups: dict[tuple[str, int], list[Path]] = {}  # by name and number of shards, 0: whole
        for path in sorted(folder.iterdir()):
            if path.suffix in suffixes:
                shard = SHARD.search(path.stem)
                groups.setdefault((SHARD.sub("", path.stem), int(shard[1]) if shard else 0), []).append(path)
        if groups:
            return _chosen(groups, folder)
    raise CheckpointError(
        f"{folder} holds no .safetensors or .pth file; give the folder of one model, or of a pipeline with a transformer/ in it"
    )


def _chosen(groups: dict[tuple[str, int], list[Path]], folder: Path) -> list[Path]:
    """Of the plainest name the whole file, or a complete set of shards. Raises CheckpointError if there is neither."""
    plainest = min(
        (name for name, _ in groups), key=lambda name: (name.split(".")[0] not in PLAIN_NAMES, name.count("."), name)
    )
    counts = sorted(count for name, count in groups if name == plainest)
    count = next((count for count in counts if count in (0, len(groups[plainest, count]))), counts[0])
    paths = groups[plainest, count]
    if count not in (0, len(paths)):
        raise CheckpointError(f"{folder} holds {len(paths)} of {count} shards; download the missing ones")
    return paths


def _read_file(path: Path, mapped: Mapped | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, and what the header says. The content tells what kind of file it is, whatever its name."""
    start = _read_start(path)
    if start[HEADER_PLACE : HEADER_PLACE + 1] == b"{":
        return _read_safetensors(path, mapped)
    if start.startswith(STARTS):
        if path.suffix in SAFETENSORS:  # by which PyTorch and the host choose how to read it
            raise CheckpointError(f"{path.name} is a PyTorch file; rename it to {path.stem}.pth")
        return _read_archive(path), {}
    for beginning, what in STAND_INS.items():
        if start.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path.name} is {what}")
    raise _unreadable(path)


def _read_start(path: Path) -> bytes:
    """The first bytes of a file. Raises CheckpointError for what is none, and for one that may not be read."""
    try:
        check_file(path)
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be opened ({error.strerror}); check who may read it") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} cannot be opened ({error}); give a checkpoint file") from error


def _check_header(path: Path) -> None:
    """Raises CheckpointError if the header of safetensors is longer than that of any model, before it is read."""
    length = int.from_bytes(_read_start(path)[:HEADER_PLACE], "little")
    if MOST_HEADER_BYTES < length <= path.stat().st_size:  # one that is longer than its file is a damaged one
        raise CheckpointError(
            f"{path.name} has a header of {length:,} bytes, and no model needs more than {MOST_HEADER_BYTES:,}; take the "
            "original file"
        )


def _read_safetensors(path: Path, mapped: Mapped | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:  # which says whether it is sound
            tensors = mapped(path) if mapped else None
            if tensors is None:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return dict(tensors), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, f" ({error})") from error


def _read_archive(path: Path) -> dict[str, Tensor]:
    try:
        tensors = read_archive(path)
    except RefusedPickle as error:
        raise CheckpointError(f"{path.name} {error}") from error
    except DAMAGE as error:
        raise _unreadable(path) from error
    if not tensors:
        raise CheckpointError(f"{path.name} holds no tensors; give a checkpoint of a SANA model")
    return tensors


def _unreadable(path: Path, detail: str = "") -> CheckpointError:
    kind = (
        "safetensors"
        if path.suffix in SAFETENSORS
        else "PyTorch"
        if path.suffix in PICKLES
        else "safetensors or PyTorch"
    )
    hint = "the download may be incomplete" if path.suffix in SUFFIXES else "it is no checkpoint"
    return CheckpointError(f"{path.name} is not a readable {kind} file{detail}; {hint}")
