"""A folder of pictures with captions, as latents and text states computed once, in batches of one size."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..autoencoder import DCAutoencoder
from ..prompt import INSTRUCTION
from ..resolution import nearest_bucket
from ..text_encoder import GemmaTextEncoder
from .autoencoder import to_unit
from .flow import FlowBatch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    """A picture file, its caption, and the size to train it at."""

    path: Path
    caption: str
    size: tuple[int, int]  # (height, width) px

    def pixels(self) -> np.ndarray:
        """Scaled and cut to its size: (height, width, 3) uint8."""
        with Image.open(self.path) as image:
            return np.array(ImageOps.fit(image.convert("RGB"), self.size[::-1], Image.Resampling.LANCZOS))


def read_pictures(folder: Path, base_size: int) -> list[Picture]:
    """The pictures in a folder, each with the text file of its name, and the bucket of base_size nearest to its shape.

    Raises ValueError if there are none, or if one has no caption.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} holds no pictures; put {', '.join(SUFFIXES)} files there, each with a .txt file of its name"
        )
    silent = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(paths)} pictures have no caption, first {silent[0].name}; write a .txt for each"
        )
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        pictures.append(Picture(path, caption, nearest_bucket(height, width, base_size)))
    return pictures


@dataclass(frozen=True)
class PictureStates:
    """Latents and text states of a folder of pictures."""

    latents: list[Tensor]  # each (32, H, W), scaled
    texts: list[Tensor]  # each (tokens, C)
    null: Tensor  # of the empty prompt, (300, C)

    @classmethod
    def prepare(
        cls, path: Path, pictures: Sequence[Picture], autoencoder: DCAutoencoder, text_encoder: GemmaTextEncoder
    ) -> "PictureStates":
        """Read the file at path, or compute the states and write it. It is computed anew if the pictures have changed."""
        wanted = json.dumps([[str(picture.path), picture.caption, picture.size] for picture in pictures])
        if not path.exists() or _contents(path) != wanted:
            save_file(compute_states(pictures, autoencoder, text_encoder), path, {"pictures": wanted})
        with safe_open(path, framework="pt") as file:
            count = range(len(pictures))
            read = file.get_tensor
            return cls([read(f"latent.{i}") for i in count], [read(f"text.{i}") for i in count], read("null"))

    def batch(self, step: int, process: int, *, size: int, seed: int = 0) -> FlowBatch:
        """Random pictures of one size; sizes come up as often as their pictures do."""
        rng = np.random.default_rng([seed, step, process])
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, latent in enumerate(self.latents):
            buckets[tuple(latent.shape)].append(i)
        shape = tuple(self.latents[int(rng.integers(len(self.latents)))].shape)
        chosen = rng.choice(buckets[shape], size=size)
        latents = torch.stack([self.latents[i] for i in chosen]).float()
        text, text_mask = pad_texts([self.texts[i].float() for i in chosen])
        return FlowBatch(latents, text=text, text_mask=text_mask, seed=int(rng.integers(2**31)))


@torch.no_grad()
def compute_states(
    pictures: Sequence[Picture], autoencoder: DCAutoencoder, text_encoder: GemmaTextEncoder
) -> dict[str, Tensor]:
    """Latents as float16 and text states as bfloat16, by name."""
    states = {"null": text_encoder([""], None)[0][0].bfloat16().cpu()}
    device = next(autoencoder.parameters()).device
    for i, picture in enumerate(tqdm(pictures, desc="encoding pictures")):
        image = to_unit(picture.pixels()[None]).to(device)
        states[f"latent.{i}"] = (autoencoder.encode(image)[0] * autoencoder.config.latent_scale).half().cpu()
        text, text_mask = text_encoder([picture.caption], INSTRUCTION)
        states[f"text.{i}"] = text[0][text_mask[0]].bfloat16().cpu()
    return states


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, each (tokens, C), as (B, L, C) and a mask (B, L) bool."""
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([[len(part)] for part in texts])
    return text, torch.arange(text.shape[1]) < lengths


def _contents(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("pictures", "")
