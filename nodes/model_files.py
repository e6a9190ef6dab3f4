"""Which model files there are: what the lists of the loaders show, where their entries are, and which part fits a model."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import folder_paths

from ..sana.checkpoints.files import SHARD, SUFFIXES, CheckpointError, tensor_names
from ..sana.checkpoints.kinds import describe
from ..sana.checkpoints.names import is_autoencoder
from ..sana.checkpoints.text_encoder import INSTRUCTION_TUNED, is_gemma
from ..sana.config import AUTOENCODER_SOURCE, TEXT_ENCODER_SOURCE
from ..sana.loading import MODELS

AUTO = "auto"
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
PIPELINE_FOLDERS = ("diffusers", *MODEL_FOLDERS)
DOWNLOADS = ("sana", "Sana")  # below models/, of another pack
PIPELINE = "model_index.json"  # in the folder of a whole pipeline of diffusers
GGUF = ".gguf"
MOST_REASONS = 6  # of a message that nothing fits

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Part:
    """A part that comes with a model, or lies in a folder for its kind."""

    folder: str  # below models/
    component: str  # of a diffusers folder
    what: str
    source: str
    matches: Callable[[Mapping[str, object]], bool]  # whether a file with tensors of these names may hold it


TEXT_ENCODER = Part("text_encoders", "text_encoder", "a Gemma-2-2b-it text encoder", TEXT_ENCODER_SOURCE, is_gemma)
AUTOENCODER = Part("vae", "vae", "a DC-AE f32c32 autoencoder", AUTOENCODER_SOURCE, is_autoencoder)


def adopt_downloads() -> None:
    """Have the lists show the models that ComfyUI_ExtraModels downloaded, which has a folder of its own for them."""
    known = {os.path.realpath(path) for path in folder_paths.get_folder_paths(MODEL_FOLDERS[0])}
    for name in DOWNLOADS:
        path = os.path.join(folder_paths.models_dir, name)
        if os.path.isdir(path) and os.path.realpath(path) not in known:
            known.add(os.path.realpath(path))
            folder_paths.add_model_folder_path(MODEL_FOLDERS[0], path)


def model_names() -> list[str]:
    """Transformers and whole checkpoints: the demo, folders, and files."""
    folders = {name for folder in PIPELINE_FOLDERS for name in _folders(folder)}
    files = {name for folder in MODEL_FOLDERS for name in _files(folder)}
    return [*MODELS, *sorted(folders), *sorted(files)]


def model_path(name: str) -> Path:
    """The file or folder of an entry. Raises CheckpointError if it is gone."""
    if name in MODELS:
        return MODELS[name]
    found = next(filter(None, (_find(folder, name) for folder in PIPELINE_FOLDERS)), None)
    if found is None:
        raise CheckpointError(
            f"{name} is in none of the folders models/{', models/'.join(MODEL_FOLDERS)}; choose another, or press R"
        )
    return found


def part_names(folder: str) -> list[str]:
    """Text encoders or autoencoders: folders that hold one, and files."""
    return [*sorted(_folders(folder)), *_files(folder), *_gguf_files(folder)]


def folder_names(folder: str) -> list[str]:
    """Models of which the files beside the weights are needed too."""
    return sorted(_folders(folder))


def part_path(folder: str, name: str) -> Path:
    """The file or folder of an entry. Raises CheckpointError if it is gone."""
    found = _find(folder, name)
    if found is None:
        raise CheckpointError(f"{name} is not in models/{folder}; choose another, or press R")
    return found


def load_part(part: Part, model: Path, chosen: str, load: Callable[[Path], Loaded]) -> tuple[Path, Loaded]:
    """The chosen part of a model, or for AUTO its own or else the first that can be loaded, with where it is.

    load: raises CheckpointError for what does not fit the model. Raises CheckpointError if nothing fits; it says why.
    """
    if chosen != AUTO:
        path = part_path(part.folder, chosen)
        return path, load(path)
    own: CheckpointError | FileNotFoundError | None = None
    if _comes_with(model, part):
        try:
            return model, load(model)
        except (CheckpointError, FileNotFoundError) as error:  # a download that left the weights of a part out
            own = error
    reasons: list[str] = []
    # Of Gemma-2-2b and Gemma-2-2b-it only the second knows instructions.
    places = _folders(part.folder)
    entries = [*sorted(places), *_files(part.folder), *_gguf_files(part.folder)]
    for name in sorted(entries, key=lambda name: not INSTRUCTION_TUNED.search(name)):
        path = places.get(name) or _file(part.folder, name)
        if path is None:  # a link that leads nowhere
            continue
        names = tensor_names(path)
        if names and not part.matches(names):
            reasons.append(f"{name} is {describe(names)}")
            continue
        try:
            return path, load(path)
        except (CheckpointError, FileNotFoundError) as error:
            reasons.append(str(error).split(";")[0])
    raise own or CheckpointError(_nothing_fits(part, model, reasons))


def _nothing_fits(part: Part, model: Path, reasons: list[str]) -> str:
    told = reasons[:MOST_REASONS] + ([f"{len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else [])
    there = (
        f"nothing in models/{part.folder} fits ({', '.join(told)})" if reasons else f"models/{part.folder} holds none"
    )
    return (
        f"{model.name} comes without {part.what}, and {there}; "
        f"download {part.source} and put it into models/{part.folder}, under any name"
    )


def _comes_with(model: Path, part: Part) -> bool:
    if model.is_dir():
        return (model / part.component).is_dir()
    return part.matches(tensor_names(model))


def _files(folder: str) -> list[str]:
    """The host's list without shards, which stand in the list of folders together."""
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if not _is_shard(name)]


def _gguf_files(folder: str) -> list[str]:
    """Text encoders that the host's list leaves out, since it reads no such files."""
    roots = folder_paths.get_folder_paths(folder) if folder == TEXT_ENCODER.folder else ()
    found = {
        os.path.relpath(os.path.join(place, name), root)
        for root in roots
        for place, _, files in _places(root)
        for name in files
        if name.endswith(GGUF)
    }
    return sorted(found.difference(folder_paths.get_filename_list(folder)))


def _find(folder: str, name: str) -> Path | None:
    return _folders(folder).get(name) or _file(folder, name)


def _file(folder: str, name: str) -> Path | None:
    """None for an entry without a file, such as a link that leads nowhere."""
    found = folder_paths.get_full_path(folder, name)
    return None if found is None else Path(found)


def _folders(folder: str) -> dict[str, Path]:
    """Folders at any depth that hold one model or a pipeline, by their path below the root that has them.

    Of two with the same path the one in the first root has it for its name, as everywhere in the host.
    """
    found: dict[str, Path] = {}
    roots = folder_paths.get_folder_paths(folder) if folder in folder_paths.folder_names_and_paths else ()
    for root in dict.fromkeys(map(os.path.normpath, roots)):
        for place in _model_folders(root):
            name = os.path.relpath(place, root)
            found[f"{name} [{root}]" if name in found else name] = place
    return found


def _model_folders(root: str) -> Iterator[Path]:
    """The folders below a root, and the root itself if shards lie in it. A pipeline is one, with all that is in it."""
    for place, folders, files in _places(root):
        if any(map(_is_shard, files)) or (place != root and _holds_model(files)):
            yield Path(place)
        if PIPELINE in files:
            folders.clear()


def _places(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, through links too, but not through those to a folder above themselves."""
    above: dict[str, frozenset[str]] = {}  # of each place the real folders on the way to it
    for place, folders, files in os.walk(root, followlinks=True):
        real, way = os.path.realpath(place), above.get(os.path.dirname(place), frozenset())
        above[place] = way | {real}
        if real in way:
            folders.clear()
        else:
            yield place, folders, files


def _holds_model(files: list[str]) -> bool:
    return PIPELINE in files or ("config.json" in files and any(name.endswith(SUFFIXES) for name in files))


def _is_shard(name: str) -> bool:
    shard = SHARD.search(Path(name).stem)
    return name.endswith(SUFFIXES) and shard is not None and int(shard[1]) > 1
