"""States of pictures that need no encoder, in shards as training reads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sana.config import DOWNSAMPLE
from sana.training.captions import TURN, Caption, Choice
from sana.training.pictures import Picture
from sana.training.shards import Shards, write_shards
from sana.training.states import Keys, PictureStates

WIDTH = 4  # of texts


def stored(
    folder: Path,
    latents: Sequence[Tensor],
    captions: Sequence[Caption] = (Caption("prompt", "a"),),
    texts: Sequence[Tensor] = (torch.zeros(2, WIDTH),),
    choice: Choice = TURN,
    processes: int = 1,
) -> PictureStates:
    """Of pictures with these latents, all with the same captions and the same texts of them."""
    folder.mkdir(exist_ok=True)
    text_keys = tuple(number(-1 - i) for i in range(len(texts)))
    keys = [Keys(number(i), text_keys, None) for i in range(len(latents))]
    write_shards(folder, [*zip(text_keys, texts, strict=True), *((number(i), each) for i, each in enumerate(latents))])
    sizes = [tuple(side * DOWNSAMPLE for side in latent.shape[1:]) for latent in latents]
    pictures = [Picture(Path(f"{i}.png"), tuple(captions), size) for i, size in enumerate(sizes)]
    return PictureStates(Shards(folder), pictures, keys, torch.zeros(300, WIDTH), choice, processes)


def number(i: int) -> bytes:
    """As a key."""
    return i.to_bytes(16, "big", signed=True)
