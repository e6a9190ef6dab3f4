"""A folder of pictures with captions, as latents and text states computed once, in batches of one size."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..config import DOWNSAMPLE, LATENT_CHANNELS
from ..images import SUFFIXES, read_picture, read_size, to_mask, to_tensor
from ..networks.autoencoder import DCAutoencoder, encode_within_memory
from ..sampling.resolution import nearest_bucket
from ..saving import replacing
from ..text.prompt import INSTRUCTION
from .captions import TURN, Caption, Choice, read_captions
from .flow import FlowBatch
from .folder import read_computed

TextEncoder = Callable[
    [Sequence[str], str | None], tuple[Tensor, Tensor]
]  # as `GemmaTextEncoder`: prompts, instruction
MASK = "-masklabel.png"  # behind the name of a picture: OneTrainer's name of the mask beside it


@dataclass(frozen=True)
class Picture:
    """A picture file, its captions, and the size to train it at."""

    path: Path
    captions: tuple[Caption, ...]  # at least one
    size: tuple[int, int]  # (height, width) px

    def key(self, encoders: str) -> str:
        """A name for its states, which changes with everything that they depend on."""
        stat = self.path.stat()
        texts = tuple(caption.text for caption in self.captions)
        parts = (self.path, stat.st_size, stat.st_mtime_ns, texts, self.size, encoders)
        return sha256(repr(parts).encode()).hexdigest()[:24]


def picture_files(folder: Path, besides: Path | None = None) -> list[Path]:
    """All pictures in a folder, at any depth, in order of their paths.

    besides: a folder whose pictures do not count, wherever it is. Raises ValueError if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with pictures, each with a .txt file of its name")
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("._"))  # of macOS
    found = (path for path in files if path.suffix.lower() in SUFFIXES and not path.name.endswith(MASK))
    paths = sorted(path for path in found if besides is None or besides.resolve() not in path.resolve().parents)
    if not paths:
        raise ValueError(
            f"{folder} holds no pictures; put {', '.join(SUFFIXES)} files there, each with a .txt file of its name"
        )
    return paths


def read_pictures(folder: Path, base_size: int, choice: Choice = TURN, besides: Path | None = None) -> list[Picture]:
    """The pictures in a folder with the captions that may be taken, each with the bucket of base_size nearest to its shape.

    besides: as for `picture_files`. Raises ValueError as it and `read_captions` do, for a file that is no picture, and if
    captions cannot be chosen for want of scores.
    """
    paths = picture_files(folder, besides)
    pictures = []
    for path, captions in zip(paths, read_captions(folder, paths), strict=True):
        try:
            possible = choice.possible(captions)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        pictures.append(Picture(path, possible, nearest_bucket(*read_size(path), base_size)))
    return pictures


def read_weights(pictures: Sequence[Picture]) -> list[Tensor] | None:
    """What the errors in each cell of each picture count, (1, H, W), 1 on average: the share of it that is white in its mask.

    None: no picture has a mask. Without one all cells count alike. Raises ValueError for a mask that is broken or black.
    """
    masks = [
        path if (path := picture.path.with_name(picture.path.stem + MASK)).exists() else None for picture in pictures
    ]
    if not any(masks):
        return None
    return [_read_weight(mask, picture.size) for mask, picture in zip(masks, pictures, strict=True)]


def _read_weight(path: Path | None, size: tuple[int, int]) -> Tensor:
    height, width = size
    if path is None:
        return torch.ones(1, height // DOWNSAMPLE, width // DOWNSAMPLE)
    fitted = ImageOps.fit(to_mask(read_picture(path)), (width, height))  # cut as the picture is
    shares = functional.avg_pool2d(torch.from_numpy(np.array(fitted))[None].float(), DOWNSAMPLE)
    if not bool(shares.any()):
        raise ValueError(f"{path} is black, so that nothing of its picture would be learnt; paint white what counts")
    return shares / shares.mean()


@dataclass(frozen=True)
class PictureStates:
    """Latents and text states of a folder of pictures."""

    latents: list[Tensor]  # each (32, H, W), scaled
    texts: list[list[Tensor]]  # of each caption of each picture, (tokens, C)
    null: Tensor  # of the empty prompt, (300, C)
    captions: Sequence[Sequence[Caption]]
    choice: Choice = TURN
    # Of the errors in each cell of a picture, (1, H, W), 1 on average; None: all count alike
    weights: list[Tensor] | None = None

    @classmethod
    def read(cls, folder: Path, pictures: Sequence[Picture], encoders: str, null: Tensor) -> "PictureStates":
        """What `write_states` has written for these pictures. Raises ValueError for a file that is damaged."""
        latents, texts = [], []
        for picture in pictures:
            shapes = {name: (None, null.shape[-1]) for name in _text_names(picture)}
            latent = (LATENT_CHANNELS, *(side // DOWNSAMPLE for side in picture.size))
            state = read_computed(_states_path(folder, picture, encoders), {"latent": latent, **shapes})
            latents.append(state["latent"])
            texts.append([state[name] for name in shapes])
        return cls(latents, texts, null, [picture.captions for picture in pictures])

    def part(self, which: slice) -> "PictureStates":
        """Those of some of the pictures, without weights."""
        return replace(
            self, latents=self.latents[which], texts=self.texts[which], captions=self.captions[which], weights=None
        )

    def batch(self, step: int, process: int, *, size: int, seed: int = 0) -> FlowBatch:
        """Random pictures of one size, each with one of its captions; sizes come up as often as their pictures do."""
        rng = np.random.default_rng([seed, step, process])
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, latent in enumerate(self.latents):
            buckets[tuple(latent.shape)].append(i)
        shape = tuple(self.latents[int(rng.integers(len(self.latents)))].shape)
        chosen = rng.choice(buckets[shape], size=size)
        latents = torch.stack([self.latents[i] for i in chosen]).float()
        text, text_mask = pad_texts([self._text(i, step, rng).float() for i in chosen])
        weight = None if self.weights is None else torch.stack([self.weights[i] for i in chosen])
        return FlowBatch(latents, text=text, text_mask=text_mask, weight=weight, seed=int(rng.integers(2**31)))

    def _text(self, i: int, step: int, rng: np.random.Generator) -> Tensor:
        """Of one of the captions of a picture."""
        texts = self.texts[i]
        if len(texts) == 1:
            return texts[0]
        return texts[int(rng.choice(len(texts), p=self.choice.weights(self.captions[i], step)))]


@torch.no_grad()
def write_states(
    folder: Path,
    pictures: Sequence[Picture],
    encoders: str,
    autoencoder: DCAutoencoder,
    text_encoder: TextEncoder,
) -> None:
    """Latents as float16 and text states as bfloat16, a file for each picture; those that are there are left.

    encoders: what tells one pair of encoders from another. Raises ValueError for a broken picture before any is encoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(autoencoder.parameters()).device
    places = [(picture, _states_path(folder, picture, encoders)) for picture in pictures]
    missing = [(picture, path) for picture, path in places if not path.exists()]
    for picture, _ in tqdm(missing, desc="checking pictures", disable=not missing):
        read_picture(picture.path)
    for picture, path in tqdm(missing, desc="encoding pictures", disable=not missing):
        image = to_tensor(read_picture(picture.path), *picture.size).to(device)
        latent = encode_within_memory(autoencoder, image)[0] * autoencoder.config.latent_scale
        states = {"latent": latent.half().cpu()}
        for name, caption in zip(_text_names(picture), picture.captions, strict=True):
            states[name] = encoded(text_encoder, caption.text).bfloat16()
        with replacing(path) as unfinished:
            save_file(states, unfinished)


@torch.no_grad()
def encoded(text_encoder: TextEncoder, prompt: str) -> Tensor:
    """The text (tokens, C) of a prompt with NVIDIA's instruction, float32 on the CPU."""
    text, text_mask = text_encoder([prompt], INSTRUCTION)
    return text[0][text_mask[0]].float().cpu()


def _text_names(picture: Picture) -> list[str]:
    """Of the texts of its captions among its states."""
    return [f"text.{i}" for i in range(len(picture.captions))]


def _states_path(folder: Path, picture: Picture, encoders: str) -> Path:
    return folder / f"{picture.key(encoders)}.safetensors"


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, each (tokens, C), as (B, L, C) and a mask (B, L) bool."""
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([[len(part)] for part in texts])
    return text, torch.arange(text.shape[1]) < lengths
