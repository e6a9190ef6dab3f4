"""Formats of quantised weights, as data: by which tensor names each is known. The host and the shell read these tables."""

from collections.abc import Iterable
from typing import NamedTuple


class QuantisedFormat(NamedTuple):
    """How somebody packs matrices into fewer bits."""

    writer: str
    marks: tuple[str, ...]  # ends of names that only this format has
    companions: tuple[str, ...] = ()  # ends of other names that stand beside a packed matrix, such as scales
    in_host: bool = False  # whether ComfyUI computes with it


COMFY_LAYER = ".comfy_quant"  # behind the name of a layer: its format, JSON as bytes
COMFY_MODEL = "scaled_fp8"  # of files for older hosts, which tell the format once for all matrices
COMFY = QuantisedFormat(
    "ComfyUI",
    (COMFY_LAYER, COMFY_MODEL),
    (".weight_scale", ".weight_scale_2", ".input_scale", ".scale_weight"),
    in_host=True,
)
BITSANDBYTES = QuantisedFormat("bitsandbytes", (".absmax", ".quant_map", ".SCB"))
QUANTO = QuantisedFormat("optimum-quanto", ("._data", "._scale", "._shift"))
SVDQUANT = QuantisedFormat("nunchaku", ("ff.inverted_conv.qweight",))
FORMATS = (COMFY, BITSANDBYTES, QUANTO, SVDQUANT)


def host_reads(names: Iterable[str]) -> bool:
    """Whether names are marks of a format that ComfyUI computes with."""
    marks = tuple(mark for row in FORMATS if row.in_host for mark in row.marks)
    return any(name.endswith(marks) for name in names)


def companions(names: Iterable[str]) -> list[str]:
    """The names, sorted, that only stand beside quantised weights."""
    ends = tuple(end for row in FORMATS for end in (*row.marks, *row.companions))
    return sorted(name for name in names if name.endswith(ends))
