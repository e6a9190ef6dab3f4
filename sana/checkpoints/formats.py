"""Formats of quantised weights, as data: by which tensor names each is known, and how scales of blocks lie in a file.

The host and the shell read these tables.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reading import parse_json


class QuantisedFormat(NamedTuple):
    """How somebody packs matrices into fewer bits."""

    writer: str
    marks: tuple[str, ...]  # ends of names that only this format has
    companions: tuple[str, ...] = ()  # ends of other names that stand beside a packed matrix, such as scales


COMFY_LAYER = ".comfy_quant"  # behind the name of a layer: its format, JSON as bytes
COMFY_FOUR_BITS = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8")  # of these, in which two numbers share a byte
COMFY_MODEL = "scaled_fp8"  # of files for older hosts, which tell the format once for all matrices
COMFY_ATTENTION = ".comfy_attention.config"  # behind the name of an attention: kernels of the host to prefer
COMFY = QuantisedFormat(
    "ComfyUI",
    (COMFY_LAYER, COMFY_MODEL),
    (
        *(".weight_scale", ".weight_scale_2", ".input_scale", ".scale_weight", ".scale_input", ".pre_quant_scale"),
        *(".weight_s_rel", ".weight_s_channel", ".weight_codebook", ".weight_correction", ".weight_zeros"),
    ),
)
BITSANDBYTES = QuantisedFormat("bitsandbytes", (".absmax", ".quant_map", ".SCB"))
QUANTO = QuantisedFormat("optimum-quanto", ("._data", "._scale", "._shift"))
COMPRESSED = QuantisedFormat("compressed-tensors", (".weight_packed", ".weight_zero_point", ".weight_shape"))
SVDQUANT = QuantisedFormat("nunchaku", ("ff.inverted_conv.qweight",))
FORMATS = (COMFY, BITSANDBYTES, COMPRESSED, QUANTO, SVDQUANT)
TILE_ROWS, TILE_COLUMNS = 128, 4  # of scales of blocks, which are stored in the order of NVIDIA's matrix products


def companions(names: Iterable[str]) -> list[str]:
    """The names, sorted, that only stand beside quantised weights."""
    ends = tuple(end for row in FORMATS for end in (*row.marks, *row.companions))
    return sorted(name for name in names if name.endswith(ends))


def layer_format(tensors: Mapping[str, Tensor], layer: str) -> dict[str, object]:
    """What ComfyUI tells of a layer: the name of its format as `format`, and more; {}: nothing that is JSON of an object."""
    stored = tensors.get(layer + COMFY_LAYER)
    try:
        found = {} if stored is None else parse_json(stored.to("cpu", torch.uint8).contiguous().numpy().tobytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def numbers_per_element(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many numbers of a matrix one element of its tensor holds: two in formats of 4 bits. name: ends in ".weight".

    Packing halves the second axis of a matrix and leaves its first one alone.
    """
    told = layer_format(tensors, name.removesuffix(".weight")).get("format")
    return 2 if tensors[name].dtype == torch.uint8 or told in COMFY_FOUR_BITS else 1


def untiled(stored: Tensor) -> Tensor:
    """Scales of blocks as a matrix of bytes, out of tiles of 128 rows and 4 columns, which are stored as 32 rows of 4 x 4
    (cuBLAS, "1D block scaling factors layout")."""
    rows, columns = stored.shape
    tiles = stored.view(torch.uint8).view(rows // TILE_ROWS, columns // TILE_COLUMNS, TILE_ROWS // 4, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def tiled(matrix: Tensor) -> Tensor:
    """The same in tiles, filled up to whole ones with zeros."""
    filled = F.pad(matrix, (0, -matrix.shape[1] % TILE_COLUMNS, 0, -len(matrix) % TILE_ROWS))
    rows, columns = filled.shape
    tiles = filled.view(rows // TILE_ROWS, 4, TILE_ROWS // 4, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def scales_of_parts(stored: Tensor, rows: int, count: int) -> Tensor:
    """Scales in tiles, laid out anew so that equal parts of their rows are those of equal parts of the matrix.

    stored: (R, C), as a file has them; others than whole tiles stay as they are. rows: of the matrix. count: of its parts.
    """
    if len(stored) % TILE_ROWS or stored.shape[1] % TILE_COLUMNS:
        return stored
    parts = untiled(stored.contiguous())[:rows].tensor_split(count)
    return torch.cat([tiled(part) for part in parts]).view(stored.dtype)
