"""What the training of a transformer starts from: a model, a folder of pictures as states, and a work folder to itself."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.files import read_tensors
from ..checkpoints.transformer import FoundTransformer, find_transformer
from ..config import TransformerIdentity
from ..loading import model_path
from ..networks.devices import computes_bfloat16
from ..networks.packed import PackedWeight
from ..pipeline import SanaPipeline
from .captions import TURN, Choice
from .digests import fingerprint
from .folder import claim
from .loop import process_state
from .pictures import Picture, TextEncoder, read_pictures
from .states import Encoders, PictureStates, cached, encoded

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where a model comes from: files, or a host that has loaded it already."""

    def find(self) -> FoundTransformer:
        """Its transformer, before anything is built."""

    def told(self) -> Mapping[str, str]:
        """What a work folder notes of it, so that no other model goes on there."""

    def load(self, dtype: torch.dtype) -> SanaPipeline:
        """The model on the CPU, since a GPU may not have room for all."""

    def texts(self, pipeline: SanaPipeline) -> bytes:
        """What tells the weights of its text encoder from others."""

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

    def load(self, dtype: torch.dtype) -> SanaPipeline:
        return SanaPipeline.load(**self.parts(), variant=self.variant, dtype=dtype)

    def texts(self, pipeline: SanaPipeline) -> bytes:
        return fingerprint(pipeline.text_encoder.model.state_dict())

    @contextmanager
    def reading(self, pipeline: SanaPipeline, device: torch.device) -> Iterator[TextEncoder]:
        yield pipeline.text_encoder.to(device)
        pipeline.text_encoder = None  # it is the largest part, and no longer needed


@dataclass(frozen=True)
class Material:
    """A model, and what it is trained on. It has its text encoder only where that is trained; else all texts are encoded."""

    pipeline: SanaPipeline
    states: PictureStates
    prompts: Sequence[Tensor] | Sequence[str]  # to draw: their texts, each (tokens, C), or prompts that are not encoded
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
    place: bool = True,
    trains_texts: bool = False,
    prompts: Sequence[str] = (),
    prior: Path | None = None,
    trigger: str = "",
    cache: Path | None = None,
    run: dict[str, str] | None = None,
) -> Iterator[Material]:
    """Check and encode everything, once, and hold the work folder until the end.

    choice: between several captions of a picture. every_weight: whether all are trained, which quantised ones cannot be.
    place: whether the transformer goes to the device, or stays on the CPU. trains_texts: whether the text encoder is trained,
    too, so that it stays, and no text is encoded. prompts: to draw, encoded like captions. prior: a second folder of pictures.
    trigger: words that some caption should have. cache: where states are kept; None: in the work folder. run: what the work
    folder is for beside model and data. Raises ValueError for Sprint, for pictures that cannot be read or have no caption, for
    a folder of another model or other data, and for a text encoder to train that a host has, and CheckpointError for parts that
    cannot be trained with, before any picture is encoded.
    """
    identity = _trainable(source.find(), every_weight)
    pictures = read_pictures(data, identity.base_size, choice, besides=folder)
    _check_trigger(trigger, pictures)
    folders = [pictures, *([read_pictures(prior, identity.base_size, choice, besides=folder)] if prior else [])]
    pipeline = source.load(dtype)
    if trains_texts and pipeline.text_encoder is None:
        raise ValueError(
            "this model has its text encoder in a host, where it cannot be trained; leave train_text_encoder out, or train in "
            "the shell"
        )
    with claim(folder, {**source.told(), "data": str(data.resolve()), **(run or {})}):
        (states, *others), texts = _encode(
            cache or folder / "states", folders, choice, prompts, source, pipeline, trains_texts=trains_texts
        )
        del pictures, folders  # they grow with the data
        if place:
            pipeline.transformer.to(process_state().device)
        if trains_texts:
            pipeline.text_encoder.to(process_state().device)
        yield Material(pipeline, states, texts, others[0] if others else None)


def fill_cache(folder: Path, data: Path, source: Source, choice: Choice = TURN) -> PictureStates:
    """The states of the pictures of a folder, before any training. Raises as `gathered` does, for a model of any kind."""
    identity = source.find().identity
    pictures = read_pictures(data, identity.base_size, choice, besides=folder)
    dtype = torch.bfloat16 if computes_bfloat16(process_state().device) else torch.float32
    return _encode(folder, [pictures], choice, (), source, source.load(dtype), option="--out")[0][0]


def _check_trigger(trigger: str, pictures: Sequence[Picture]) -> None:
    if trigger and not any(trigger in caption.text for picture in pictures for caption in picture.captions):
        log.warning('No caption contains the trigger "%s"; the LoRA will not learn to follow it.', trigger)


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
    folder: Path,
    folders: Sequence[Sequence[Picture]],
    choice: Choice,
    prompts: Sequence[str],
    source: Source,
    pipeline: SanaPipeline,
    *,
    trains_texts: bool = False,
    option: str = "--cache",
) -> tuple[list[PictureStates], Sequence[Tensor] | Sequence[str]]:
    """The states of the pictures of each of several folders, and the texts of the prompts.

    folder: where states are kept. option: of the shell, by which it is given. Nothing of the text encoder is left behind, unless
    it is trained and texts stay as they are.
    """
    device = process_state().device
    autoencoder = pipeline.autoencoder.to(device)
    if trains_texts:
        return cached(folder, folders, Encoders.of(autoencoder), choice, option), prompts
    known = source.texts(pipeline)
    with source.reading(pipeline, device) as text_encoder:
        states = cached(folder, folders, Encoders.of(autoencoder, text_encoder, known), choice, option)
        return states, [encoded(text_encoder, prompt) for prompt in prompts]
