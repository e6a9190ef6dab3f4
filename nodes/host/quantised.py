"""Files with matrices quantised as the host does it: packed numbers, and beside them their scales and the name of their format.

Which tensors a format has and of what sizes is the host's to know, and differs between its versions, so a layer of the host
is asked to take them.
"""

from collections.abc import Mapping
from dataclasses import replace

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class
from torch import Tensor

from ...sana.checkpoints.files import CheckpointError, TensorFile
from ...sana.checkpoints.filling import check_tensors
from ...sana.checkpoints.formats import BITSANDBYTES, COMFY, COMFY_LAYER, COMFY_MODEL, layer_format

INSTEAD = "use a file with the formats of ComfyUI, or one that is not quantised"
EMBEDDING = "embed_tokens"  # how the name of the only layer ends that is no matrix product
BLOCK = 32  # the largest number that a format of the host rounds sizes up to
# What the host raises where a layer lacks a scale, or where sizes do not fit.
MISFITS = (ValueError, TypeError, AttributeError, RuntimeError, LookupError, AssertionError)


def with_formats(file: TensorFile) -> TensorFile:
    """The file with a format beside every quantised matrix, also if it tells them in its header or as files for older hosts do.

    Raises CheckpointError if it tells two formats for a layer.
    """
    tensors = dict(file.tensors)  # a copy for the host to take apart
    marks = [name for name in tensors if name.endswith("." + COMFY_MODEL)]
    for prefix in ("", *(name.removesuffix(COMFY_MODEL) for name in marks)):
        tensors, _ = comfy.utils.convert_old_quants(tensors, prefix, metadata={} if prefix else file.metadata)
    for layer in _quantised_layers(file.tensors):
        told = [layer_format(stored, layer).get("format") for stored in (file.tensors, tensors)]
        if told[0] != told[1]:
            raise CheckpointError(
                f"{file.path.name} tells two formats for the layer {layer}, {told[0]} and {told[1]}; {INSTEAD}"
            )
    return replace(file, tensors=tensors)


def check_quantised(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """`check_tensors` for tensors with quantised matrices or without: packed ones are checked by the host.

    Raises CheckpointError also for a format that the host does not know, for scales without a format, which the host would
    leave out, and for a layer that the host cannot unpack.
    """
    layers = {layer: _beside(tensors, layer) for layer in _quantised_layers(tensors)}
    packed = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    plain = {key: tensor for key, tensor in tensors.items() if key not in packed}
    by_others = next((key for key in sorted(plain) if key.endswith(BITSANDBYTES.marks)), None)
    if by_others is not None:
        raise CheckpointError(
            f"{name} is quantised by bitsandbytes, with {by_others} beside its weights; load it with Load SANA, which unpacks it"
        )
    unknown = next((key for key in sorted(plain) if key.endswith(COMFY.companions)), None)
    if unknown is not None:
        raise CheckpointError(f"{name} has the scale {unknown}, and nothing in it says in which format; {INSTEAD}")
    matrices = {f"{layer}.weight" for layer in layers} & expected.keys() & tensors.keys()
    check_tensors(expected, {**plain, **{key: expected[key] for key in matrices}}, name)
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, full_precision_mm=True)
    kinds: set[object] = set()  # of one matrix each is unpacked
    for layer, parts in layers.items():
        weight = expected.get(f"{layer}.weight")
        if weight is None or weight.ndim != 2:
            raise CheckpointError(f"{name} has a format for {layer}, which has no matrix; it is another model")
        told = _checked_format(layer, parts, name)
        found = {key: _told(tensor) for key, tensor in sorted(parts.items()) if key != COMFY_LAYER[1:]}
        kind = (str(told), weight.shape, str(found))
        try:
            _take(operations, weight.shape, layer, parts, unpack=kind not in kinds, name=name)
        except MISFITS as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{name} has for {layer} {', '.join(f'{key} {what}' for key, what in found.items())}, which make no "
                f"{told['format']} matrix of {weight.shape[0]} x {weight.shape[1]} numbers; it is damaged or another model"
            ) from error
        kinds.add(kind)


def _told(tensor: Tensor) -> str:
    """Its shape and its dtype."""
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _quantised_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(COMFY_LAYER) for key in tensors if key.endswith(COMFY_LAYER)]


def _beside(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """All that a quantised layer has but its bias, by the rest of the names."""
    start = f"{layer}."
    found = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    return {key: tensor for key, tensor in found.items() if key != "bias"}


def _checked_format(layer: str, parts: Mapping[str, Tensor], name: str) -> dict[str, object]:
    """What a layer tells of its format. Raises CheckpointError if the host does not know it, or for bad scales."""
    told = layer_format({f"{layer}.{key}": tensor for key, tensor in parts.items()}, layer)
    if told.get("format") not in QUANT_ALGOS:
        raise CheckpointError(
            f"{name} has {layer} in the format {told.get('format')}, and this ComfyUI knows {', '.join(QUANT_ALGOS)}; update "
            f"ComfyUI, or {INSTEAD}"
        )
    if not any(key.startswith("weight_") for key in parts):
        raise CheckpointError(f"{name} lacks the scale of {layer}; the download may be incomplete")
    for key, tensor in parts.items():
        if key != "weight" and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{name} has numbers in {layer}.{key} that are not finite; it is damaged")
    return told


def _take(
    operations: type,
    shape: torch.Size,
    layer: str,
    parts: Mapping[str, Tensor],
    *,
    unpack: bool,
    name: str,
) -> None:
    """Have a layer of the host take a matrix. unpack: also make numbers of it.

    Raises one of MISFITS if the parts are no matrix of this shape, CheckpointError if the host does not read one of them.
    """
    if layer.endswith(EMBEDDING):
        found = operations.Embedding(*shape, device="meta")
    else:
        found = operations.Linear(shape[1], shape[0], bias=False)
    left = found.load_state_dict(dict(parts), strict=False).unexpected_keys
    if left:
        raise CheckpointError(
            f"{name} has {layer}.{left[0]}, which this ComfyUI does not read in the format {found.quant_format}; update "
            f"ComfyUI, or {INSTEAD}"
        )
    if layer.endswith(EMBEDDING):  # too large to be unpacked, and in no format that packs its rows
        if parts["weight"].shape != shape or parts["weight_scale"].numel() not in (1, shape[0]):
            raise ValueError(f"an embedding of {parts['weight'].shape}")
    elif unpack:
        layout = get_layout_class(QUANT_ALGOS[found.quant_format]["comfy_tensor_layout"])
        unpacked = layout.dequantize(found.weight._qdata, found.weight._params).shape
        if any(not size <= stored < size + BLOCK for size, stored in zip(shape, unpacked, strict=True)):
            raise ValueError(f"a matrix of {unpacked}")
