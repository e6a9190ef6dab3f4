"""Quantised files: what stands beside each weight is gathered into one packed weight, which then takes the weight's place.

Whoever reads the file further, to rename, to recognise or to fill, sees weights by their names and shapes alone.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.packed import (
    MX_BLOCK,
    NV_BLOCK,
    PackedWeight,
    code_blocks,
    mx_blocks,
    nv_blocks,
    scaled,
    signed_fours,
)
from ..reading import parse_json
from .files import CheckpointError, TensorFile
from .formats import COMFY_MODEL, COMPRESSED, TILE_COLUMNS, TILE_ROWS, layer_format, untiled
from .numbers import LARGEST

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# What stands beside the weight of a layer, behind the layer's name. Of ComfyUI, compressed-tensors and bitsandbytes.
BESIDE = re.compile(
    r"(?P<layer>.+)\.(?P<part>comfy_quant|weight_scale|weight_scale_2|input_scale|pre_quant_scale|SCB|weight_format|"
    r"weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+))"
)
OLD_NAMES = {".scale_weight": ".weight_scale", ".scale_input": ".input_scale"}  # of files for older hosts
HEADER_ENTRY = "_quantization_metadata"  # of ComfyUI, in a safetensors header: JSON with the formats of layers by name
CONFIG_ENTRY = "quantization_config"  # of transformers and diffusers, in config.json
STATE = "weight.quant_state.bitsandbytes__"  # behind it nf4 or fp4; JSON as bytes
ROW_ORDER = 0  # of `weight_format`: the matrix as it is; other orders are of GPUs' own
ROTATION = 256  # numbers that are rotated together where a file does not say
AXES, MATRIX = range(2, 5), range(2, 3)  # how many a packed weight has; a convolution has 4


class Layer(NamedTuple):
    """A quantised layer as a file has it."""

    file: str
    name: str
    weight: Tensor
    beside: dict[str, Tensor]  # by what stands behind the layer's name
    told: dict[str, object]  # what ComfyUI says of the layer

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file} has the quantised layer {self.name} {what}; take the original file")

    def scale(self, part: str, sizes: tuple[int, ...] | None = None, *, wide: bool = True) -> Tensor:
        """Finite numbers of one of so many; None: of any. Raises CheckpointError for others, and if there are none.

        wide: floating-point ones of 16 bits or more; else such as take a byte.
        """
        if part not in self.beside:
            raise self.error(f"without its {part}")
        found = self.beside[part]
        if sizes is not None and found.numel() not in sizes:
            raise self.error(
                f"with a {part} of shape {tuple(found.shape)} beside a weight of {tuple(self.weight.shape)}"
            )
        if (found.itemsize == 1) == wide or (wide and not found.is_floating_point()):
            raise self.error(f"with a {part} in {_name(found.dtype)}, which no such format has")
        if found.is_floating_point() and not found.float().isfinite().all():
            raise self.error(f"with a {part} that is not finite")
        return found

    def row_scale(self, part: str = "weight_scale") -> Tensor:
        """A number for each row, (R, 1), or for all, (1, 1)."""
        return self.scale(part, (1, len(self.weight))).reshape(-1, 1)

    def expect(self, *dtypes: torch.dtype, axes: range = AXES) -> None:
        """Raises CheckpointError unless the weight is stored in one of these, with so many axes."""
        if self.weight.dtype not in dtypes:
            stored = str(self.weight.dtype).removeprefix("torch.")
            raise self.error(f"with {', '.join(self.beside)} beside numbers in {stored}, which no format has")
        if self.weight.ndim not in axes:
            raise self.error(f"of shape {tuple(self.weight.shape)}, which is no matrix")


def with_packed(file: TensorFile) -> TensorFile:
    """The file with packed weights in the place of quantised ones, and nothing beside them.

    Weights in float8 without a scale are packed ones too; what else is float8 gets the dtype of other tensors, which is
    exact. Raises CheckpointError for a layer in a format that is not read here or in two of them, and for scales that are
    missing, not finite or of another size.
    """
    tensors = _modern_names(file)
    told = _told_by_header(file, tensors)
    beside: dict[str, dict[str, Tensor]] = {layer: {} for layer in told}
    for name in [name for name in tensors if BESIDE.fullmatch(name)]:
        layer, part = BESIDE.fullmatch(name).groups()
        beside.setdefault(layer, {})[part] = tensors.pop(name)
        if part == "comfy_quant":
            told[layer] = layer_format({name: beside[layer][part]}, layer)
    for layer, parts in beside.items():
        weight = tensors.get(f"{layer}.weight")
        if f"{layer}{COMPRESSED.marks[0]}" in tensors:
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}  # for `check_numbers` to name
            continue
        if weight is None:
            raise CheckpointError(
                f"{file.path.name} has {', '.join(parts) or 'a format'} of {layer}, and not its weight; the download may be "
                "incomplete"
            )
        found = Layer(file.path.name, layer, weight, parts, told.get(layer, {}))
        tensors[f"{layer}.weight"] = _packed(found, file)
    floats = (tensor.dtype for tensor in tensors.values() if isinstance(tensor, Tensor) and tensor.is_floating_point())
    others = next((dtype for dtype in floats if dtype not in FP8_DTYPES), torch.bfloat16)
    for name, tensor in tensors.items():
        if tensor.dtype in FP8_DTYPES:
            matrix = name.endswith(".weight") and tensor.ndim > 1
            tensors[name] = _unscaled(tensor) if matrix else tensor.to(others)
    return replace(file, tensors=tensors)


def by_compressed_tensors(file: TensorFile) -> bool:
    """Whether the configuration beside a file says that compressed-tensors has quantised it."""
    quantiser = file.config.get(CONFIG_ENTRY)
    return isinstance(quantiser, Mapping) and quantiser.get("quant_method") == "compressed-tensors"


def _modern_names(file: TensorFile) -> dict[str, Tensor]:
    """The tensors, with the names that ComfyUI gives scales today, and without the mark that it gave whole files.

    Raises CheckpointError for a scale with both names.
    """
    found = {}
    for name, tensor in file.tensors.items():
        end = next((end for end in OLD_NAMES if name.endswith(end)), "")
        new = name.removesuffix(end) + OLD_NAMES.get(end, "")
        if end and new in file.tensors:
            raise CheckpointError(
                f"{file.path.name} has {name} and {new}, two scales in the place of one; take the original file"
            )
        if name.split(".")[-1] != COMFY_MODEL:
            found[new] = tensor
    return found


def _told_by_header(file: TensorFile, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """What a header of ComfyUI says of each layer that is there."""
    try:
        layers = parse_json(file.metadata.get(HEADER_ENTRY, "{}")).get("layers", {})
        return {name: dict(told) for name, told in layers.items() if f"{name}.weight" in tensors}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path.name} has no JSON of layers in {HEADER_ENTRY}; download it again") from error


def _packed(layer: Layer, file: TensorFile) -> PackedWeight:
    """The weight of a layer in the one format that its companions tell."""
    by_comfy = "comfy_quant" in layer.beside or bool(layer.told)
    by_bits = "weight.absmax" in layer.beside or "SCB" in layer.beside
    if by_comfy and by_bits or {"weight.absmax", "SCB"} <= layer.beside.keys():
        raise layer.error(f"in two formats at once, with {' and '.join(sorted(layer.beside))}")
    if by_comfy:
        name = layer.told.get("format")
        if not isinstance(name, str) or name not in OF_COMFY:
            raise CheckpointError(
                f"{layer.file} has the layer {layer.name} in the format {name!r:.50}, which is not read here; load it in ComfyUI, "
                f"or take one of {', '.join(OF_COMFY)}"
            )
        return OF_COMFY[name](layer)
    if by_bits:
        return _bits_8(layer) if "SCB" in layer.beside else _bits_4(layer)
    if layer.weight.dtype in FP8_DTYPES:
        return _fp8(layer)
    if layer.weight.dtype == torch.int8 and by_compressed_tensors(file):
        return _int8(layer)
    raise layer.error(f"with {', '.join(layer.beside)} beside it, and nothing says in which format")


def _fp8(layer: Layer) -> PackedWeight:
    """float8, and a scale for each row or for all. A scale of inputs is for hosts that compute in float8."""
    layer.expect(*FP8_DTYPES)
    parts = {"packed": layer.weight.flatten(1), "scale": layer.row_scale()}
    return PackedWeight(f"{_name(layer.weight.dtype)} with scales", scaled, parts, layer.weight.shape)


def _unscaled(weight: Tensor) -> PackedWeight:
    return PackedWeight(_name(weight.dtype), scaled, {"packed": weight.flatten(1)}, weight.shape)


def _int8(layer: Layer) -> PackedWeight:
    layer.expect(torch.int8)
    parts = {"packed": layer.weight.flatten(1), "scale": layer.row_scale()}
    group = _rotation(layer, parts["packed"].shape[1])
    if group:
        return PackedWeight("rotated int8", partial(scaled, group=group), parts, layer.weight.shape)
    return PackedWeight("int8 with scales", scaled, parts, layer.weight.shape)


def _int4(layer: Layer) -> PackedWeight:
    layer.expect(torch.int8, torch.uint8, axes=MATRIX)
    shape = (len(layer.weight), 2 * layer.weight.shape[1])
    parts = {"packed": layer.weight.view(torch.uint8), "scale": layer.row_scale()}
    unpack = partial(signed_fours, group=_rotation(layer, shape[1], always=True))
    return PackedWeight("rotated int4", unpack, parts, shape)


def _rotation(layer: Layer, columns: int, always: bool = False) -> int:
    """Numbers that are rotated together; 0: none are."""
    more = layer.told.get("params")
    told = {**(more if isinstance(more, Mapping) else {}), **layer.told}
    if not (always or told.get("convrot")):
        return 0
    group = told.get("convrot_groupsize", ROTATION)
    if type(group) is not int or group < 4 or 4 ** round(math.log(group, 4)) != group or columns % group:
        raise layer.error(f"of {columns} columns rotated in groups of {group!r}, which cannot be")
    return group


def _mxfp8(layer: Layer) -> PackedWeight:
    layer.expect(*FP8_DTYPES, axes=MATRIX)
    scale = _untiled(layer, layer.weight.shape[1] // MX_BLOCK, torch.uint8)
    if (scale == 255).any():
        raise layer.error("with a weight_scale that is not finite")
    parts = {"packed": layer.weight, "scale": scale}
    return PackedWeight("mxfp8", mx_blocks, parts, layer.weight.shape, MX_BLOCK)


def _nvfp4(layer: Layer) -> PackedWeight:
    layer.expect(torch.uint8, axes=MATRIX)
    rows, columns = len(layer.weight), 2 * layer.weight.shape[1]
    scale = _untiled(layer, columns // NV_BLOCK, torch.float8_e4m3fn)
    parts = {"packed": layer.weight, "scale": scale, "scale_2": layer.scale("weight_scale_2", (1,)).reshape(1, 1)}
    if "pre_quant_scale" in layer.beside:
        parts["columns"] = layer.scale("pre_quant_scale", (columns,)).reshape(1, -1)
    return PackedWeight("nvfp4", nv_blocks, parts, (rows, columns), NV_BLOCK)


def _untiled(layer: Layer, columns: int, dtype: torch.dtype) -> Tensor:
    """The scales of blocks, (R, columns), out of tiles."""
    rows = len(layer.weight)
    padded = rows + -rows % TILE_ROWS, columns + -columns % TILE_COLUMNS
    stored = layer.scale("weight_scale", (math.prod(padded),), wide=False)
    scale = untiled(stored.contiguous().view(padded))[:rows, :columns].contiguous().view(dtype)
    if dtype.is_floating_point and not scale.float().isfinite().all():
        raise layer.error("with a weight_scale that is not finite")
    return scale


def _bits_8(layer: Layer) -> PackedWeight:
    """int8 of bitsandbytes, with the largest number of each row."""
    layer.expect(torch.int8, axes=MATRIX)
    order = layer.beside.get("weight_format")
    if order is not None and order.float().flatten().tolist() != [ROW_ORDER]:
        raise layer.error("in an order of its own (weight_format); save it again with bitsandbytes 0.38 or newer")
    largest = layer.scale("SCB", (len(layer.weight),)).reshape(-1, 1)
    parts = {"packed": layer.weight, "scale": largest.float() / 127}
    return PackedWeight("bitsandbytes int8", scaled, parts, layer.weight.shape)


def _bits_4(layer: Layer) -> PackedWeight:
    """nf4 or fp4 of bitsandbytes: places in a list of 16 numbers, and the largest number of each block."""
    told = _state(layer)
    shape, block = torch.Size(told["shape"]), told["blocksize"]
    packed = layer.weight.flatten().view(torch.uint8)
    if 2 * len(packed) != shape.numel():
        raise layer.error(f"of shape {tuple(shape)} in {len(packed)} bytes")
    scale = _largest(layer, told, math.ceil(shape.numel() / block))
    codes = layer.scale("weight.quant_map", (16,)).reshape(1, -1)
    rows = shape[0] if shape.numel() // shape[0] % block == 0 else 1  # else blocks reach across rows
    parts = {"packed": packed.view(rows, -1), "scale": scale.view(rows, -1), "codes": codes}
    return PackedWeight(f"bitsandbytes {told['quant_type']}", partial(code_blocks, block=block), parts, shape)


def _state(layer: Layer) -> dict[str, object]:
    """What bitsandbytes says of a weight: its shape, the numbers in a block, and more."""
    name = next((name for name in layer.beside if name.startswith(STATE)), None)
    if name is None:
        raise layer.error(f"without its {STATE}nf4")
    try:
        told = parse_json(layer.beside[name].to("cpu", torch.uint8).contiguous().numpy().tobytes())
        nested = {"nested_blocksize": 1, "nested_offset": 0.0, **told}
        sizes = [*told["shape"], told["blocksize"], nested["nested_blocksize"]]
        valid = all(type(size) is int and 0 < size <= LARGEST for size in sizes) and len(told["shape"]) in AXES
        if valid and told["blocksize"] % 2 == 0 and math.isfinite(nested["nested_offset"]):  # two numbers share a byte
            return {**nested, "quant_type": name.removeprefix(STATE)}
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise layer.error(f"with a {name} that does not tell its shape and blocks")


def _largest(layer: Layer, told: Mapping[str, object], count: int) -> Tensor:
    """The largest number of each block, (count,), which double quantisation has stored in 8 bits."""
    twice = any(part.startswith("weight.nested_") for part in layer.beside)
    stored = layer.scale("weight.absmax", (count,), wide=not twice).flatten()
    if not twice:
        return stored.float()
    block = told["nested_blocksize"]
    outer = layer.scale("weight.nested_absmax", (math.ceil(count / block),)).float().flatten()
    codes = layer.scale("weight.nested_quant_map", (256,)).float().flatten()
    return codes[stored.view(torch.uint8).int()] * outer.repeat_interleave(block)[:count] + told["nested_offset"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


OF_COMFY: dict[str, Callable[[Layer], PackedWeight]] = {
    "float8_e4m3fn": _fp8,
    "float8_e5m2": _fp8,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "int8_tensorwise": _int8,
    "convrot_w4a4": _int4,
}


def format_name(tensor: Tensor | PackedWeight) -> str:
    """What the numbers of a tensor are stored in, for people."""
    return tensor.kind if isinstance(tensor, PackedWeight) else _name(tensor.dtype)


def packed_kinds(tensors: Mapping[str, Tensor | PackedWeight]) -> Iterator[str]:
    """The formats of packed weights, with how many have each."""
    kinds = [tensor.kind for tensor in tensors.values() if isinstance(tensor, PackedWeight)]
    yield from (f"{kinds.count(kind)} in {kind}" for kind in dict.fromkeys(kinds))
