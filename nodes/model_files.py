"""Which model files there are: what the lists of the loaders show, and where their entries are."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import folder_paths

from ..sana.checkpoints.files import CheckpointError, tensor_names
from ..sana.checkpoints.names import is_autoencoder
from ..sana.checkpoints.text_encoder import is_gemma
from ..sana.config import AUTOENCODER_SOURCE
from ..sana.config import TEXT_ENCODER_SOURCE as GEMMA_SOURCE
from ..sana.pipeline import MODELS

AUTO = "auto"
INSTRUCTION_TUNED = re.compile(r"(?<![a-z])it(?![a-z])", re.IGNORECASE)  # in the name of a text encoder
MODEL_FOLDERS = ("diffusion_models", "checkpoints")


def model_names() -> list[str]:
    """Transformers and whole checkpoints: the demo, diffusers folders, and files."""
    files = {name for folder in MODEL_FOLDERS for name in folder_paths.get_filename_list(folder)}
    return [*MODELS, *sorted(_diffusers_folders()), *sorted(files)]


def model_path(name: str) -> Path:
    """The file or folder of an entry. Raises CheckpointError if it is gone."""
    if name in MODELS:
        return MODELS[name]
    if name in _diffusers_folders():
        return _diffusers_folders()[name]
    for folder in MODEL_FOLDERS:
        found = folder_paths.get_full_path(folder, name)
        if found is not None:
            return Path(found)
    raise CheckpointError(
        f"{name} is in none of the folders models/{', models/'.join(MODEL_FOLDERS)}; choose another, or press R"
    )


def part_names(folder: str) -> list[str]:
    """Text encoders or autoencoders: files, and folders with a config.json."""
    return [*sorted(_model_folders(folder)), *folder_paths.get_filename_list(folder)]


def part_path(folder: str, name: str) -> Path:
    """The file or folder of an entry. Raises CheckpointError if it is gone."""
    found = _find_part(folder, name)
    if found is None:
        raise CheckpointError(f"{name} is not in models/{folder}; choose another, or press R")
    return found


def text_encoder_for(model: Path, chosen: str) -> Path:
    """The text encoder of a model, or the chosen one. Raises CheckpointError if none is found."""
    return _part_for(
        model, chosen, "text_encoders", "text_encoder", is_gemma, "a Gemma-2-2b-it text encoder", GEMMA_SOURCE
    )


def autoencoder_for(model: Path, chosen: str) -> Path:
    """The autoencoder of a model, or the chosen one. Raises CheckpointError if none is found."""
    return _part_for(model, chosen, "vae", "vae", is_autoencoder, "a DC-AE f32c32 autoencoder", AUTOENCODER_SOURCE)


def _part_for(
    model: Path,
    chosen: str,
    folder: str,
    component: str,
    matches: Callable[[Mapping[str, object]], bool],
    what: str,
    source: str,
) -> Path:
    if chosen != AUTO:
        return part_path(folder, chosen)
    if model.is_dir() and (model / component).is_dir():
        return model
    if model.is_file() and matches(tensor_names(model)):
        return model
    # The tensors of Gemma-2-2b and Gemma-2-2b-it differ in their values alone, and only the second knows instructions.
    for name in sorted(part_names(folder), key=lambda name: not INSTRUCTION_TUNED.search(name)):
        path = _find_part(folder, name)
        if path is not None and matches(tensor_names(path)):
            return path
    raise CheckpointError(
        f"{model.name} comes without {what}, and models/{folder} holds none; download {source} and put it into models/{folder}"
    )


def _find_part(folder: str, name: str) -> Path | None:
    """None for an entry without a file, such as a link that leads nowhere."""
    found = _model_folders(folder).get(name) or folder_paths.get_full_path(folder, name)
    return None if found is None else Path(found)


def _diffusers_folders() -> dict[str, Path]:
    """Folders of whole pipelines below models/diffusers, by their name."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for place, _, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                found[os.path.relpath(place, root)] = Path(place)
    return found


def _model_folders(folder: str) -> dict[str, Path]:
    """Folders with one Hugging Face model each, directly below models/<folder>."""
    roots = (Path(root) for root in folder_paths.get_folder_paths(folder))
    places = (place for root in roots if root.is_dir() for place in _with_config(root))
    return {place.name: place for place in places}


def _with_config(root: Path) -> Iterator[Path]:
    return (place for place in sorted(root.iterdir()) if (place / "config.json").is_file())
