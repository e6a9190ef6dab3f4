"""Formats of quantised weights, as data: by which tensor names each is known. The host and the shell read these tables."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

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
