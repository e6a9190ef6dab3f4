"""Transformers and text encoders to files with packed matrices, in ComfyUI's own format.

A matrix becomes numbers of 8 or 4 bits with scales beside them, and a mark that names their format, as JSON in bytes. The header tells
the same of all layers. comfy-kitchen packs, which ComfyUI computes with. The source is mapped, and the target written layer by
layer, so memory holds one packed layer, and no more than ROWS of its rows in float32.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..networks.transformer import SanaTransformer
from ..saving import remove_leftovers, replacing
from ..text.gemma import Gemma2
from .files import CheckpointError, TensorFile, read_tensors
from .filling import FLOAT_DTYPES, check_tensors
from .formats import COMFY_LAYER
from .header import transformer_header
from .kinds import describe
from .modelspec import TEXT_ENCODER, modelspec
from .names import control_blocks, is_transformer
from .packing import HEADER_ENTRY
from .tensor_writer import ALIGNMENT, DTYPES, TensorWriter
from .text_encoder import find_tokenizer, gemma_config, gemma_tensors, is_gemma, stored_companions
from .transformer import find_transformer, transformer_tensors

ROWS = 1024  # packed at a time; a multiple of 128, the rows that lie together in the scales of blocks
BESIDE = (".weight", ".weight_scale", ".weight_scale_2", COMFY_LAYER)  # what a packed layer may have, behind its name
BLOCKS = ("transformer_blocks.", "layers.")  # what names of a transformer and of Gemma-2 begin with, but for the ends
EMBEDDING = "embed_tokens.weight"
GEMMA_PREFIX = "model."  # of the host's own files
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
KITCHEN = "0.2.26"  # of comfy-kitchen: the oldest that is tested, with all of these formats

Packed = dict[str, Tensor]  # a matrix and its scales, by what stands behind the name of the layer


class PackedFormat(NamedTuple):
    """How comfy-kitchen packs a matrix, and what the host calls it."""

    name: str
    layout: str
    largest: float | None = None  # packed number that the scale of a matrix leads to; None: it has no such scale
    by_row: bool = False  # whether every row has a scale of its own
    looks_up: bool = False  # whether the host takes rows out of a packed embedding


PACKED_FORMATS = {
    "fp8": PackedFormat("float8_e4m3fn", "TensorCoreFP8Layout", 448.0, looks_up=True),
    "int8": PackedFormat("int8_tensorwise", "TensorWiseINT8Layout", by_row=True, looks_up=True),
    "mxfp8": PackedFormat("mxfp8", "TensorCoreMXFP8Layout"),
    "nvfp4": PackedFormat("nvfp4", "TensorCoreNVFP4Layout", 448.0 * 6.0),
}


class _Plan(NamedTuple):
    """What to write."""

    name: str  # of the source, for errors
    network: nn.Module  # on meta, with the sizes that the tensors must have
    tensors: dict[str, Tensor]  # of it, by their names there
    dtype: torch.dtype  # of what stays unpacked
    what: str
    prefix: str = ""  # of the names in the file
    header: Mapping[str, str] = {}
    companions: Mapping[str, Tensor] = {}  # which stand beside the network


def quantise(
    source: Path | str,
    target: Path | str,
    form: str,
    *,
    ends: bool = False,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> str:
    """Write the transformer or Gemma-2 of source as target, a safetensors file with packed matrices, and say what was written.

    form: a name from PACKED_FORMATS. Packed are the matrices of the blocks, 1x1 convolutions among them. ends: also those around the
    blocks, which change what is drawn far more than they take; of Gemma-2 that is the embedding, if the host takes rows out of
    such a one. dtype: of all other tensors; None: as they are, or as the model was released if that is not in 16 bits.
    Raises CheckpointError if source is neither, is incomplete, is quantised or has numbers that are not finite, ValueError for
    an unknown form or a target that exists or is no `.safetensors` file, RuntimeError without comfy-kitchen, and OSError if target
    cannot be written. The target appears when it is complete, or not at all.
    """
    target = Path(target)
    if form not in PACKED_FORMATS:
        raise ValueError(f"quantised format {form!r} is unknown; use one of {', '.join(PACKED_FORMATS)}")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors; give the name of the file to write")
    if target.exists():
        raise ValueError(f"{target} exists already; give another name, or remove it first")
    packed_format = PACKED_FORMATS[form]
    pack = _packer(packed_format)
    file = read_tensors(source, "transformer")
    plan = _plan(file, variant)
    check_tensors(plan.network.state_dict(), plan.tensors, file.path.name)
    matrices = [name for name, tensor in plan.tensors.items() if _is_packed(name, tensor, packed_format, ends)]
    kept = dtype or plan.dtype
    remove_leftovers(target.parent)
    with replacing(target) as unfinished:
        _write(unfinished, plan, matrices, kept, packed_format, pack)
    rest = len(plan.tensors) - len(matrices)
    dtype_name = str(kept).removeprefix("torch.")
    return f"{target}: {plan.what}, {len(matrices)} matrices in {form}, {rest} tensors in {dtype_name}"


def _plan(file: TensorFile, variant: str | None) -> _Plan:
    """Raises CheckpointError for what is neither a transformer nor a Gemma-2, or is quantised already."""
    if is_transformer(file.tensors):
        _check_numbers(transformer_tensors(file), file)
        identity, tensors, name = find_transformer(file, variant)
        if control_blocks(file.tensors):
            raise CheckpointError(f"{name} holds a ControlNet too, which would be lost; use the file as it is")
        network = SanaTransformer(identity.config, device="meta")
        dtype = getattr(torch, identity.dtype)
        return _Plan(name, network, tensors, dtype, identity.variant, header=transformer_header(identity))
    if is_gemma(file.tensors):
        tensors = gemma_tensors(file)
        _check_numbers(tensors, file)
        config = gemma_config(tensors, file)
        stored = tensors[EMBEDDING].dtype if EMBEDDING in tensors else None
        dtype = stored if stored in SIXTEEN_BITS else torch.bfloat16
        companions = stored_companions(find_tokenizer(file, config), config)
        network = Gemma2(config, device="meta")
        told = modelspec(TEXT_ENCODER, "Gemma-2")
        return _Plan(file.path.name, network, tensors, dtype, "Gemma-2", GEMMA_PREFIX, told, companions)
    raise CheckpointError(
        f"{file.path.name} is {describe(file.tensors)}; what can be quantised are a SANA transformer and a Gemma-2 text encoder"
    )


def _check_numbers(tensors: Mapping[str, Tensor], file: TensorFile) -> None:
    """Raises CheckpointError unless all are floating-point numbers of 16 bits or more."""
    packed = next((name for name in sorted(tensors) if tensors[name].dtype not in FLOAT_DTYPES), None)
    if packed is not None:
        dtype = str(tensors[packed].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file.path.name} is quantised already, with {packed} in {dtype}; give the file that it was made from"
        )


def _is_packed(name: str, tensor: Tensor, form: PackedFormat, ends: bool) -> bool:
    """Whether a tensor of this name in the network is a matrix to pack, and no table of modulations, norm or depthwise convolution."""
    if tensor.ndim != 2 or not name.endswith(".weight"):
        return False
    return name.startswith(BLOCKS) or (ends and (form.looks_up or name != EMBEDDING))


def _write(
    path: Path,
    plan: _Plan,
    matrices: list[str],
    dtype: torch.dtype,
    form: PackedFormat,
    pack: Callable[[str, Tensor], Packed],
) -> None:
    """What stays unpacked first, and then every layer: its bytes, the mark, and larger numbers."""
    told = {"format": form.name}
    layers = {plan.prefix + name.removesuffix(".weight"): name for name in matrices}
    plain = {plan.prefix + name: (tensor, dtype) for name, tensor in plan.tensors.items() if name not in matrices}
    plain |= {name: (tensor, tensor.dtype) for name, tensor in plan.companions.items()}
    header = {HEADER_ENTRY: json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, told)})}
    names = [*plain, *(layer + end for layer in layers for end in BESIDE)]
    with TensorWriter(path, names, {"format": "pt", **plan.header, **header}) as out:
        for name, (tensor, stored) in sorted(plain.items(), key=lambda item: -item[1][1].itemsize):
            out.write(name, tensor.to(stored))
        for layer, name in layers.items():
            packed = pack(f"{plan.name}: tensor {name}", plan.tensors[name])
            wide = {end: tensor for end, tensor in packed.items() if tensor.itemsize > 1}
            for end in (end for end in packed if end not in wide):
                out.write(layer + end, packed[end])
            out.write(layer + COMFY_LAYER, _mark(told, out.position))
            for end, tensor in wide.items():
                out.write(layer + end, tensor)


def _mark(told: Mapping[str, str], position: int) -> Tensor:
    """JSON as bytes, with spaces behind it up to where larger numbers may begin. position: of its first byte in the file."""
    text = json.dumps(told).encode()
    end = position + len(text)
    return torch.frombuffer(bytearray(text.ljust(len(text) + -end % ALIGNMENT)), dtype=torch.uint8)


def _packer(form: PackedFormat) -> Callable[[str, Tensor], Packed]:
    """What packs a matrix (rows, columns); it takes its name too, for errors. Raises RuntimeError without comfy-kitchen."""
    try:
        from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

        get_layout_class(form.layout)
    except (ImportError, KeyError) as error:
        raise RuntimeError(
            f"quantising to {form.name} needs the package comfy-kitchen, {KITCHEN} or newer, which recent versions of ComfyUI "
            f'bring; install it with: pip install "comfy-kitchen>={KITCHEN}"'
        ) from error
    options = {"per_channel": True} if form.by_row else {}

    def pack(name: str, matrix: Tensor) -> Packed:
        largest = max(bound.abs().float() for bound in matrix.aminmax())
        if not largest.isfinite():
            raise CheckpointError(f"{name} has numbers that are not finite, which no format holds; take another file")
        scale = largest / form.largest if form.largest and largest else torch.tensor(1.0)
        parts = [
            QuantizedTensor.from_float(rows.float(), form.layout, scale=scale, **options).state_dict(".weight")
            for rows in matrix.split(ROWS)
        ]
        return {end: _joined([part[end] for part in parts]) for end in parts[0]}

    return pack


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of a matrix, or of what stands beside it; a scale of the whole matrix is the same in all parts.

    The exponents of mxfp8 become bytes, as hosts take them too: older versions of safetensors do not know their dtype.
    """
    if parts[0].dtype not in DTYPES:
        parts = [part.view(torch.uint8) for part in parts]
    return torch.cat(parts) if parts[0].ndim else parts[0]
