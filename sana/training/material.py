"""What the training of a transformer starts from: a model, a folder of pictures as states, and a work folder to itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import TensorFile, read_tensors
from ..checkpoints.transformer import find_transformer
from ..config import TransformerIdentity
from ..loading import model_path
from ..networks.autoencoder import DCAutoencoder
from ..networks.packed import PackedWeight
from ..pipeline import SanaPipeline
from ..text.text_encoder import GemmaTextEncoder
from .captions import TURN, Choice
from .folder import claim
from .loop import process_state
from .pictures import Picture, PictureStates, encoded, read_pictures, read_weights, write_states


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is: as for `SanaPipeline.load`, or a name of `MODELS`."""

    model: Path | str = "demo"
    autoencoder: Path | str | None = None
    text_encoder: Path | str | None = None
    variant: str | None = None

    def parts(self) -> dict[str, Path | None]:
        """The paths, each under the name of its argument."""
        found = {name: getattr(self, name) for name in ("model", "autoencoder", "text_encoder")}
        return {name: path and model_path(path) for name, path in found.items()}


@dataclass(frozen=True)
class Material:
    """A model without its text encoder, and what it is trained on."""

    pipeline: SanaPipeline
    pictures: Sequence[Picture]
    states: PictureStates
    prompts: Sequence[Tensor]  # texts of prompts to draw, each (tokens, C)
    prior: PictureStates | None = None  # of pictures that show what is to stay as it is

    @property
    def identity(self) -> TransformerIdentity:
        return self.pipeline.identity


@contextmanager
def gathered(
    folder: Path,
    data: Path,
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float32,
    choice: Choice = TURN,
    every_weight: bool = False,
    prompts: Sequence[str] = (),
    prior: Path | None = None,
    run: dict[str, str] | None = None,
) -> Iterator[Material]:
    """Check and encode everything, once, and hold the work folder until the end.

    choice: between several captions of a picture. every_weight: whether all are trained, which quantised ones cannot be.
    prompts: to draw, encoded like captions. prior: a second folder of pictures. run: what the work folder is for beside model
    and data. Raises ValueError for Sprint, for pictures that cannot be read or have no caption, and for a folder of another
    model or other data, and CheckpointError for parts that cannot be trained with, before any picture is encoded.
    """
    parts = files.parts()
    identity = _trainable(read_tensors(parts["model"], "transformer"), files.variant, every_weight)
    pictures = read_pictures(data, identity.base_size, choice, besides=folder)
    weights = read_weights(pictures)
    others = read_pictures(prior, identity.base_size, choice, besides=folder) if prior else []
    machine = process_state()
    # On the CPU: a GPU may not have room for all
    pipeline = SanaPipeline.load(**parts, variant=files.variant, dtype=dtype)
    given = {"variant": files.variant} if files.variant else {}
    known = {"model": str(parts["model"].resolve()), "data": str(data.resolve()), **given, **(run or {})}
    with claim(folder, known):
        for encoder in (pipeline.autoencoder, pipeline.text_encoder):
            encoder.to(machine.device)
        encoders = f"{parts['autoencoder'] or parts['model']}, {parts['text_encoder'] or parts['model']}"
        every = _encode(folder / "states", [*pictures, *others], encoders, pipeline.autoencoder, pipeline.text_encoder)
        both = replace(every, choice=choice)
        states = replace(both.part(slice(len(pictures))), weights=weights)
        texts = [encoded(pipeline.text_encoder, prompt) for prompt in prompts]
        pipeline.text_encoder = None  # it is the largest part, and no longer needed
        pipeline.transformer.to(machine.device)
        yield Material(pipeline, pictures, states, texts, both.part(slice(len(pictures), None)) if others else None)


def _trainable(file: TensorFile, variant: str | None, every_weight: bool) -> TransformerIdentity:
    """What a transformer is. Raises ValueError for one of a kind that cannot be trained."""
    identity, tensors, _ = find_transformer(file, variant)
    if every_weight and any(isinstance(tensor, PackedWeight) for tensor in tensors.values()):
        raise ValueError(
            f"{file.path.name} is quantised, and here every weight is trained; unpack it by `python -m sana convert --dtype bfloat16`"
        )
    if identity.config.guidance_embed:
        raise ValueError(
            f"{file.path.name} is a Sprint model, which learns from a teacher; train a SANA or SANA-1.5 model"
        )
    return identity


def _encode(
    folder: Path, pictures: Sequence[Picture], encoders: str, autoencoder: DCAutoencoder, gemma: GemmaTextEncoder
) -> PictureStates:
    """The states of the pictures; of several processes each encodes its part."""
    machine = process_state()
    own = pictures[machine.process_index :: machine.num_processes]
    write_states(folder, own, encoders, autoencoder, gemma)
    machine.wait_for_everyone()
    with torch.no_grad():
        null = gemma([""], None)[0][0].float().cpu()
    return PictureStates.read(folder, pictures, encoders, null)
