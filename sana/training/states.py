"""Latents and text states of pictures: computed once, kept in shards on the disk, and read from there batch by batch."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import DOWNSAMPLE, LATENT_CHANNELS
from ..images import read_picture, to_tensor
from ..networks.autoencoder import DCAutoencoder, encode_within_memory
from ..text.prompt import INSTRUCTION
from .captions import Caption, Choice
from .digests import Digests, fingerprint
from .flow import FlowBatch
from .folder import claim
from .loop import process_state
from .order import Order
from .pictures import Picture, TextEncoder, mask_path, read_weight
from .shards import KEY_BYTES, Shards, write_shards

EXAMPLES = 6
DIGESTS = "digests.parquet"
HOLDS = {"holds": "latents and text states of pictures"}  # what a folder of states is for
Made = Generator[tuple[bytes, Tensor], None, None]  # keys with what they stand for


@dataclass(frozen=True)
class Keys:
    """Under which keys the states of a picture are kept. They change with everything that the states depend on."""

    latent: bytes
    texts: tuple[bytes, ...]  # of each caption; (): captions are not encoded
    weight: bytes | None  # of its mask

    def captions(self, picture: Picture) -> Iterator[tuple[bytes, str]]:
        """The captions that are encoded, by their keys."""
        if self.texts:
            yield from zip(self.texts, (caption.text for caption in picture.captions), strict=True)


@dataclass(frozen=True)
class Example:
    """A picture to look at, with the size it is trained at, (height, width) px, and its first caption, see `PictureStates.text`."""

    path: Path
    size: tuple[int, int]
    text: Tensor | str


@dataclass(frozen=True)
class Wanted:
    """States of a picture that are to be computed, by their keys."""

    picture: Picture
    latent: bytes | None
    texts: Mapping[bytes, str]  # captions
    weight: bytes | None


class PictureStates:
    """The states of a folder of pictures, which stay on the disk. In memory are a few numbers of each picture.

    null: text of the empty prompt, (300, C); None: captions are not encoded, and are in memory, too. choice: between several
    captions of a picture. processes: that train together.
    """

    def __init__(
        self,
        shards: Shards,
        pictures: Sequence[Picture],
        keys: Sequence[Keys],
        null: Tensor | None,
        choice: Choice,
        processes: int = 1,
    ) -> None:
        self.shards, self.null, self.choice = shards, null, choice
        self.latents = shards.find([each.latent for each in keys])
        self.texts = shards.find([*chain.from_iterable(each.texts for each in keys)])
        self.starts = np.cumsum([0, *(len(picture.captions) for picture in pictures)])  # of the texts of each picture
        captions = [*chain.from_iterable(picture.captions for picture in pictures)]
        self.captions = [caption.text for caption in captions] if null is None else None
        self.scores = np.array([np.nan if caption.score is None else caption.score for caption in captions])
        self.weights = None  # rows of weights; -1: a picture without a mask
        if any(each.weight for each in keys):
            self.weights = shards.find([each.weight or bytes(KEY_BYTES) for each in keys])
        self.sizes, buckets = np.unique([picture.size for picture in pictures], axis=0, return_inverse=True)
        self.bucket = buckets.ravel().astype(np.int16)  # of each picture, a row of sizes
        self.order = Order([np.flatnonzero(self.bucket == i) for i in range(len(self.sizes))], processes)
        self.examples = [Example(pictures[i].path, pictures[i].size, self.text(i, 0)) for i in spread(len(pictures))]

    def __len__(self) -> int:
        return len(self.latents)

    def used(self) -> int:
        """How many rows of the shards are of these pictures."""
        rows = (self.latents, self.texts, () if self.weights is None else self.weights[self.weights >= 0])
        return len(np.unique(np.concatenate(rows)))

    def batch(self, step: int, process: int, *, size: int, seed: int = 0) -> FlowBatch:
        """Pictures of one size, each with one of its captions; which ones, the step and the process tell, see `Order`.

        Raises ValueError, with the file, where states are damaged.
        """
        chosen, turns = self.order.batch(step, process, size=size, seed=seed)
        rng = np.random.default_rng([seed, step, process])
        latents = torch.stack([self._cells(self.latents[i], i, LATENT_CHANNELS) for i in chosen])
        texts = [self.text(i, self._caption(i, int(turn), rng)) for i, turn in zip(chosen, turns, strict=True)]
        weight = None if self.weights is None else torch.stack([self._weight(i) for i in chosen])
        batch = FlowBatch(latents, weight=weight, seed=int(rng.integers(2**31)))
        if self.captions is not None:
            return replace(batch, captions=texts)
        text, text_mask = pad_texts(texts)
        return replace(batch, text=text, text_mask=text_mask)

    def text(self, picture: int, caption: int) -> Tensor | str:
        """The text (tokens, C) of a caption of a picture, float32; the caption itself where these are not encoded."""
        row = self.starts[picture] + caption
        if self.captions is not None:
            return self.captions[row]
        return self.shards.read(self.texts[row], (None, self.null.shape[-1])).float()

    def _caption(self, picture: int, turn: int, rng: np.random.Generator) -> int:
        scores = self.scores[self.starts[picture] : self.starts[picture + 1]]
        if len(scores) == 1:
            return 0
        captions = [Caption("", "", None if np.isnan(score) else float(score)) for score in scores]
        return int(rng.choice(len(captions), p=self.choice.weights(captions, turn)))

    def _weight(self, picture: int) -> Tensor:
        row = self.weights[picture]
        return read_weight(None, self._size(picture)) if row < 0 else self._cells(row, picture, 1)

    def _size(self, picture: int) -> tuple[int, int]:
        height, width = self.sizes[self.bucket[picture]].tolist()
        return height, width

    def _cells(self, row: int, picture: int, channels: int) -> Tensor:
        """What a row holds of each cell of a picture, (channels, H, W) float32."""
        return self.shards.read(row, (channels, *(side // DOWNSAMPLE for side in self._size(picture)))).float()


@dataclass(frozen=True)
class Encoders:
    """The networks that make states. latents, texts: what tells them from others, by their weights, see `fingerprint`.

    text_encoder: None where it is trained, so that what it makes of captions is another at each step.
    """

    autoencoder: DCAutoencoder
    text_encoder: TextEncoder | None
    latents: bytes
    texts: bytes

    @classmethod
    def of(cls, autoencoder: DCAutoencoder, text_encoder: TextEncoder | None = None, texts: bytes = b"") -> "Encoders":
        """texts: what tells the weights of the text encoder from others."""
        scale = repr(autoencoder.config.latent_scale).encode()
        return cls(
            autoencoder,
            text_encoder,
            scale + fingerprint(autoencoder.encoder.state_dict()),
            INSTRUCTION.encode() + texts,
        )

    def keys(self, picture: Picture, digests: Digests) -> Keys:
        """Raises OSError for a picture that is gone."""
        mask = mask_path(picture)
        captions = () if self.text_encoder is None else picture.captions
        return Keys(
            _key("latent", digests.of(picture.path), picture.size, self.latents),
            tuple(_key("text", caption.text, self.texts) for caption in captions),
            None if mask is None else _key("weight", digests.of(mask), picture.size),
        )


def cached(
    folder: Path,
    folders: Sequence[Sequence[Picture]],
    encoders: Encoders,
    choice: Choice,
    option: str = "--cache",
) -> list[PictureStates]:
    """The states of the pictures of each of several folders. Those that are missing are computed, and no others.

    folder: where states are kept, of any pictures and any encoders. option: of the shell, by which it is given. Of several
    processes each computes its part. Raises ValueError for a broken picture before any is encoded, for a shard that is damaged,
    and for a folder in which another process computes states or that is for something else, and OSError.
    """
    machine = process_state()
    with claim(folder, HOLDS, option):
        if machine.is_main_process:
            digests = read_digests(folder, chain.from_iterable(folders))
        machine.wait_for_everyone()
        if not machine.is_main_process:
            digests = read_digests(folder, ())
        found = [(picture, encoders.keys(picture, digests)) for pictures in folders for picture in pictures]
        write_states(folder, found, encoders, machine.process_index, machine.num_processes)
        machine.wait_for_everyone()
    shards = Shards(folder)
    null = None if encoders.text_encoder is None else empty_text(encoders.text_encoder)
    keys = iter([each for _, each in found])
    return [
        PictureStates(shards, pictures, [next(keys) for _ in pictures], null, choice, machine.num_processes)
        for pictures in folders
    ]


def read_digests(folder: Path, pictures: Iterable[Picture]) -> Digests:
    """With those of the pictures and their masks, which are kept in the folder of states."""
    digests = Digests(folder / DIGESTS)
    for picture in pictures:
        for path in (picture.path, mask_path(picture)):
            if path is not None:
                digests.of(path)
    digests.save()
    return digests


def write_states(
    folder: Path, pictures: Sequence[tuple[Picture, Keys]], encoders: Encoders, process: int = 0, processes: int = 1
) -> None:
    """Latents as float16, text states as bfloat16 and weights as float32, as far as they are missing; one process' share of them.

    Raises ValueError for a broken picture or mask before any is encoded, and OSError if the disk is full or a picture is gone,
    with what is to be done. What came before an error is kept.
    """
    share = wanted(Shards(folder), pictures)[process::processes]
    latents = {each.latent: each.picture for each in share if each.latent}
    texts = {key: text for each in share for key, text in each.texts.items()}
    checked = {each.weight: encoded_mask(each.picture) for each in share if each.weight}
    for picture in tqdm(latents.values(), desc="checking pictures", disable=not latents):
        read_picture(picture.path)

    def made() -> Made:
        yield from checked.items()
        for key, picture in tqdm(latents.items(), desc="encoding pictures", disable=not latents):
            yield key, encoded_picture(encoders.autoencoder, picture)
        for key, text in tqdm(texts.items(), desc="encoding captions", disable=not texts):
            yield key, encoded(encoders.text_encoder, text).bfloat16()

    try:
        with closing(made()) as rows:  # with the bars, above an error that is told below them
            write_shards(folder, rows)
    except OSError as error:
        raise OSError(f"{error}; the same command then goes on with what is not encoded yet") from error


def wanted(shards: Shards, pictures: Sequence[tuple[Picture, Keys]]) -> list[Wanted]:
    """What is not in the shards, each state once; a picture of which nothing is missing is left out."""
    keys = dict.fromkeys(chain.from_iterable((each.latent, *each.texts, each.weight) for _, each in pictures))
    keys.pop(None, None)
    missing = {key for key, row in zip(keys, shards.find([*keys]), strict=True) if row < 0}

    def take(key: bytes | None) -> bool:
        """Whether nobody has taken it before."""
        found = key in missing
        missing.discard(key)
        return found

    found = [
        Wanted(
            picture,
            each.latent if take(each.latent) else None,
            {key: text for key, text in each.captions(picture) if take(key)},
            each.weight if take(each.weight) else None,
        )
        for picture, each in pictures
    ]
    return [each for each in found if each.latent or each.texts or each.weight]


@torch.no_grad()
def encoded_picture(autoencoder: DCAutoencoder, picture: Picture) -> Tensor:
    """Its latent (32, H, W), as the transformer sees it, float16. Raises ValueError for a broken picture, and OSError."""
    device = next(autoencoder.parameters()).device
    image = to_tensor(read_picture(picture.path), *picture.size).to(device)
    return (encode_within_memory(autoencoder, image)[0] * autoencoder.config.latent_scale).half()


def encoded_mask(picture: Picture) -> Tensor:
    """What counts in a picture, (1, H, W) float32, as `read_weight` gives and refuses it."""
    return read_weight(mask_path(picture), picture.size)


@torch.no_grad()
def encoded(text_encoder: TextEncoder, prompt: str) -> Tensor:
    """The text (tokens, C) of a prompt with NVIDIA's instruction, float32 on the CPU."""
    text, text_mask = text_encoder([prompt], INSTRUCTION)
    return text[0][text_mask[0]].float().cpu()


@torch.no_grad()
def empty_text(text_encoder: TextEncoder) -> Tensor:
    """The text (300, C) of the empty prompt, which guidance leads away from, float32 on the CPU."""
    return text_encoder([""], None)[0][0].float().cpu()


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, each (tokens, C), as (B, L, C) and a mask (B, L) bool."""
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([[len(part)] for part in texts])
    return text, torch.arange(text.shape[1]) < lengths


def spread(count: int) -> range:
    """Up to EXAMPLES places in a list of so many."""
    return range(0, count, -(-count // EXAMPLES))


def _key(*parts: object) -> bytes:
    """What some state depends on, in as many bytes as a key has."""
    return sha256(repr(parts).encode()).digest()[:KEY_BYTES]
