"""Damaged and hostile inputs of every kind that the package reads, each made from its seed alone.

A kind is a function of random numbers, an empty folder and the originals: it writes an input into the folder and returns what is
handed to the readers.
"""

from pathlib import Path
from random import Random

from .checkpoints import configurations, folders, loras, safetensors
from .originals import Damaged, Kind
from .pickles import hostile_pickles, pickles
from .pictures import pictures
from .prompts import prompts
from .tokenizers import tokenizers

KINDS: dict[str, Kind] = {
    "safetensors": safetensors,
    "pickles": pickles,
    "hostile-pickles": hostile_pickles,
    "configurations": configurations,
    "tokenizers": tokenizers,
    "folders": folders,
    "loras": loras,
    "pictures": pictures,
    "prompts": prompts,
}


def make(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    """The input of a kind with a seed, always the same one."""
    return KINDS[kind](Random(f"{kind} {seed}"), folder, originals)
