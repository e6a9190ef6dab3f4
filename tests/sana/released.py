"""Names, shapes and configurations of the tensors in released checkpoints, without their numbers."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).parent.parent / "data" / "released_tensors.json.gz"


class Released(NamedTuple):
    tensors: dict[str, Tensor]  # on meta
    config: dict[str, object]  # config.json of a diffusers folder; empty for official files
    parameters: int | None  # as the authors' own module counts them


def released(part: str, dialect: str, name: str) -> Released:
    """part: "transformers" or "autoencoders"; dialect: "official" or "original", or "diffusers"."""
    row = _table()[part][dialect][name]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in row["tensors"].items()}
    return Released(tensors, row.get("config", {}), row.get("parameters"))


def names(part: str, dialect: str) -> list[str]:
    return list(_table()[part][dialect])


@cache
def _table() -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(gzip.decompress(PATH.read_bytes()))
