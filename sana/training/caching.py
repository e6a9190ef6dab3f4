"""The states of a folder of pictures by workers of Ray, each of which writes shards of its own."""

import logging
from collections.abc import Container, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..cluster.faults import tried
from ..cluster.places import place_errors
from ..cluster.treating import TreatTogether, treat_all
from ..cluster.workers import Workers
from ..networks.devices import computes_bfloat16
from .captions import Choice
from .folder import claim
from .material import ModelFiles
from .pictures import read_pictures
from .shards import Shards, write_shards
from .states import HOLDS, Encoders, Made, Wanted, encoded, encoded_mask, encoded_picture, read_digests, wanted

log = logging.getLogger(__name__)


class Cached(NamedTuple):
    """What lies in a folder of states."""

    pictures: int  # that were asked for and can be read
    used: int  # states of them
    kept: int  # of any pictures
    failed: int  # pictures that cannot be read


def fill_on_workers(folder: Path, data: Path, files: ModelFiles, choice: Choice, workers: Workers) -> Cached:
    """What `fill_cache` writes, by workers. A picture that cannot be read is told of, and stops nothing.

    folder, data and files lie on a disk that all machines share. Raises ValueError as `fill_cache`, but for broken pictures,
    and as `treat_all`.
    """
    broken: list[ValueError] = []
    folder, data = folder.absolute(), data.absolute()
    pictures = read_pictures(data, files.find().identity.base_size, choice, folder, broken.append)
    for error in broken:
        log.warning("%s", error)
    device = torch.device("cuda" if workers.devices else "cpu")
    with claim(folder, HOLDS):
        digests = read_digests(folder, pictures)
        encoders = load_encoders(files, torch.device("cpu"))  # only to know what is missing
        latents, texts = encoders.latents, encoders.texts
        keys = [(picture, encoders.keys(picture, digests)) for picture in pictures]
        del encoders
        missing = [(each.picture.path, each) for each in wanted(Shards(folder), keys)]
        failed = 0
        if missing:
            make = partial(encode_together, folder, files, device, latents, texts)
            _, failed = treat_all(missing, make, workers, "encoding pictures", together=True)
    shards = Shards(folder)
    asked = {*chain.from_iterable((each.latent, *each.texts, each.weight) for _, each in keys)} - {None}
    used = int((shards.find([*asked]) >= 0).sum())
    return Cached(len(pictures) - failed, used, len(shards), failed + len(broken))


def load_encoders(files: ModelFiles, device: torch.device) -> Encoders:
    """On a device, in the numbers that `fill_cache` would take there."""
    pipeline = files.load(torch.bfloat16 if computes_bfloat16(device) else torch.float32)
    known = files.texts(pipeline)
    return Encoders.of(pipeline.autoencoder.to(device), pipeline.text_encoder.to(device), known)


def encode_together(
    folder: Path, files: ModelFiles, device: torch.device, latents: bytes, texts: bytes
) -> TreatTogether[Wanted]:
    """What a worker does: encodes pictures into shards of a folder. Of each it gives 1, or why it cannot be read.

    latents, texts: as the keys were made with, see `Encoders`. Raises ValueError for other networks than those.
    """
    encoders = load_encoders(files, device)
    if (encoders.latents, encoders.texts) != (latents, texts):
        raise ValueError("the autoencoder or the text encoder is another one here; copy the same files to all machines")
    shards = Shards(folder)

    def treat(pictures: Sequence[Wanted]) -> Sequence[int | Exception]:
        nonlocal shards
        shards = Shards(folder, shards)  # with what others have written since, such as one that ended after it had
        keys = [key for each in pictures for key in (each.weight, each.latent, *each.texts) if key]
        done = {key for key, row in zip(keys, shards.find(keys), strict=True) if row >= 0}
        found: list[int | Exception] = []

        def made() -> Made:
            for each in pictures:
                # A caption is wanted even if its picture is broken, since it may be that of another one, too.
                parts = [tried(encode, each, encoders, done) for encode in (_picture_states, _text_states)]
                found.append(next((part for part in parts if isinstance(part, Exception)), 1))
                for part in parts:
                    if not isinstance(part, Exception):
                        yield from part.items()

        with place_errors(OSError):
            write_shards(folder, made())
        return found

    return treat


def _picture_states(of: Wanted, encoders: Encoders, done: Container[bytes]) -> dict[bytes, Tensor]:
    """By their keys, but for those that are done."""
    found: dict[bytes, Tensor] = {}
    if of.weight and of.weight not in done:
        found[of.weight] = encoded_mask(of.picture)
    if of.latent and of.latent not in done:
        found[of.latent] = encoded_picture(encoders.autoencoder, of.picture)
    return found


def _text_states(of: Wanted, encoders: Encoders, done: Container[bytes]) -> dict[bytes, Tensor]:
    texts = {key: text for key, text in of.texts.items() if key not in done}
    return {key: encoded(encoders.text_encoder, text).bfloat16() for key, text in texts.items()}
