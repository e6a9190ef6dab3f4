"""What the training of a transformer starts from: a model, a folder of pictures as states, and a work folder to itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.files import read_tensors
from ..checkpoints.transformer import FoundTransformer, find_transformer
from ..config import TransformerIdentity
from ..loading import model_path
from ..networks.packed import PackedWeight
from ..pipeline import SanaPipeline
from .captions import TURN, Choice
from .folder import claim
from .loop import process_state
from .pictures import Picture, PictureStates, TextEncoder, encoded, read_pictures, read_weights, write_states


class Source(Protocol):
    """Where a model comes from: files, or a host that has loaded it already."""

    def find(self) -> FoundTransformer:
        """Its transformer, before anything is built."""

    def told(self) -> Mapping[str, str]:
        """What a work folder notes of it, so that no other model goes on there."""

    def encoders(self) -> str:
        """What tells its autoencoder and text encoder from others."""

    def load(self, dtype: torch.dtype) -> SanaPipeline:
        """The model on the CPU, since a GPU may not have room for all."""

    def reading(self, pipeline: SanaPipeline, device: torch.device) -> AbstractContextManager[TextEncoder]:
        """Its text encoder on a device, which it leaves at the end."""


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

    def find(self) -> FoundTransformer:
        return find_transformer(read_tensors(self.parts()["model"], "transformer"), self.variant)

    def told(self) -> dict[str, str]:
        given = {"variant": self.variant} if self.variant else {}
        return {"model": str(self.parts()["model"].resolve()), **given}

    def encoders(self) -> str:
        parts = self.parts()
        return f"{parts['autoencoder'] or parts['model']}, {parts['text_encoder'] or parts['model']}"

    def load(self, dtype: torch.dtype) -> SanaPipeline:
        return SanaPipeline.load(**self.parts(), variant=self.variant, dtype=dtype)

    @contextmanager
    def reading(self, pipeline: SanaPipeline, device: torch.device) -> Iterator[TextEncoder]:
        yield pipeline.text_encoder.to(device)
        pipeline.text_encoder = None  # it is the largest part, and no longer needed


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
    source: Source,
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
    identity = _trainable(source.find(), every_weight)
    pictures = read_pictures(data, identity.base_size, choice, besides=folder)
    weights = read_weights(pictures)
    others = read_pictures(prior, identity.base_size, choice, besides=folder) if prior else []
    machine = process_state()
    pipeline = source.load(dtype)
    with claim(folder, {**source.told(), "data": str(data.resolve()), **(run or {})}):
        every, texts = _encode(folder / "states", [*pictures, *others], prompts, source, pipeline)
        both = replace(every, choice=choice)
        states = replace(both.part(slice(len(pictures))), weights=weights)
        pipeline.transformer.to(machine.device)
        yield Material(pipeline, pictures, states, texts, both.part(slice(len(pictures), None)) if others else None)


def _trainable(found: FoundTransformer, every_weight: bool) -> TransformerIdentity:
    """What a transformer is. Raises ValueError for one of a kind that cannot be trained."""
    if every_weight and any(isinstance(tensor, PackedWeight) for tensor in found.tensors.values()):
        raise ValueError(
            f"{found.name} is quantised, and here every weight is trained; unpack it by `python -m sana convert --dtype bfloat16`"
        )
    if found.identity.config.guidance_embed:
        raise ValueError(f"{found.name} is a Sprint model, which learns from a teacher; train a SANA or SANA-1.5 model")
    return found.identity


def _encode(
    folder: Path, pictures: Sequence[Picture], prompts: Sequence[str], source: Source, pipeline: SanaPipeline
) -> tuple[PictureStates, list[Tensor]]:
    """The states of the pictures, of which each of several processes encodes its part, and the texts of the prompts.

    Nothing of the text encoder is left behind.
    """
    machine, encoders = process_state(), source.encoders()
    autoencoder = pipeline.autoencoder.to(machine.device)
    with source.reading(pipeline, machine.device) as text_encoder, torch.no_grad():
        own = pictures[machine.process_index :: machine.num_processes]
        write_states(folder, own, encoders, autoencoder, text_encoder)
        null = text_encoder([""], None)[0][0].float().cpu()
        texts = [encoded(text_encoder, prompt) for prompt in prompts]
    machine.wait_for_everyone()
    return PictureStates.read(folder, pictures, encoders, null), texts
