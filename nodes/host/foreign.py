"""Files with matrices quantised by others than the host: in a format of the host where one says the same, else unpacked.

Unpacked matrices are those of a file that was never quantised, so that the host moves, patches and saves them as any others.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...sana.checkpoints.files import TensorFile
from ...sana.checkpoints.formats import COMFY_LAYER
from ...sana.checkpoints.packing import BESIDE, FP8_DTYPES, by_compressed_tensors, packed_kinds, with_packed
from ...sana.networks.packed import PackedWeight
from .quantised import with_formats

OF_BITSANDBYTES = ("SCB", "weight_format", "weight.")  # how what stands beside its matrices begins
FP8 = {"format": "float8_e4m3fn"}  # as every host has it: with one scale for a matrix
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
NUMBERS = (*SIXTEEN_BITS, torch.float32)

log = logging.getLogger(__name__)


def in_host_formats(file: TensorFile) -> TensorFile:
    """The file with every matrix as the host has it, but for those of others, which are packed weights for `unpacked`.

    Raises CheckpointError as `with_formats` and `with_packed` do.
    """
    file = with_formats(file)
    foreign = _foreign_layers(file)
    theirs = {name: tensor for name, tensor in file.tensors.items() if _layer(name) in foreign}
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in theirs}
    for name, tensor in with_packed(replace(file, tensors=theirs, metadata={})).tensors.items():
        tensors |= _in_host_format(name, tensor)
    return replace(file, tensors=tensors)


def unpacked(tensors: Mapping[str, Tensor | PackedWeight], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    """The tensors with numbers in the place of packed weights, and a line in the log on what these take.

    dtype: of the numbers; None, or none to compute with: that of others in 16 bits, or bfloat16. name: of the file.
    """
    packed = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, PackedWeight)}
    if not packed:
        return dict(tensors)
    stored = (tensor.dtype for key, tensor in tensors.items() if key not in packed and tensor.dtype in SIXTEEN_BITS)
    made = dtype if dtype in NUMBERS else next(stored, torch.bfloat16)
    kinds, size = ", ".join(packed_kinds(packed)), sum(weight.numel() for weight in packed.values()) * made.itemsize
    log.info(
        "%s has quantised matrices, %s, which ComfyUI does not compute with; unpacked into %s they take %.2f GB",
        *(name, kinds, str(made).removeprefix("torch."), size / 1e9),
    )
    return {key: tensor.numbers(made) if key in packed else tensor for key, tensor in tensors.items()}


def _foreign_layers(file: TensorFile) -> set[str]:
    """The quantised layers of which the host has not said the format. Of numbers in float8 the dtype says it."""
    beside = [found.groups() for found in map(BESIDE.fullmatch, file.tensors) if found]
    weights = {layer: file.tensors.get(f"{layer}.weight") for layer, _ in beside}
    fp8 = {layer for layer, weight in weights.items() if weight is not None and weight.dtype in FP8_DTYPES}
    by_others = {layer for layer, part in beside if by_compressed_tensors(file) or part.startswith(OF_BITSANDBYTES)}
    return {layer for layer in by_others | fp8 if f"{layer}{COMFY_LAYER}" not in file.tensors}


def _layer(name: str) -> str:
    """Of which quantised layer a tensor would be a part. Biases are none."""
    found = BESIDE.fullmatch(name)
    return found["layer"] if found else name.removesuffix(".weight")


def _in_host_format(name: str, weight: Tensor | PackedWeight) -> dict[str, Tensor | PackedWeight]:
    """A weight with its scale and its mark if the host has its format, else as it is."""
    parts = weight.parts if isinstance(weight, PackedWeight) else {}
    fp8 = parts.keys() == {"packed", "scale"} and parts["packed"].dtype == torch.float8_e4m3fn
    if not fp8 or parts["scale"].numel() != 1:
        return {name: weight}
    layer, mark = name.removesuffix(".weight"), json.dumps(FP8).encode()
    return {
        name: parts["packed"].view(weight.shape),
        f"{layer}.weight_scale": parts["scale"].float().reshape(()),
        f"{layer}{COMFY_LAYER}": torch.frombuffer(bytearray(mark), dtype=torch.uint8),
    }
