"""Transformers from files: which one it is, and the network with its weights.

The variant is read from the tensors, never from the file name. What tensors cannot tell, the size a model was trained for,
its flow shift and the guidance that suits it, comes from the header of a file we wrote, from the configuration beside it, or from
the table of variants, which all have one guidance.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import (
    DEFAULT_FLOW_SHIFT,
    DEFAULT_GUIDANCE_SCALE,
    DOWNSAMPLE,
    TRANSFORMER_SOURCE,
    VARIANTS,
    TransformerConfig,
    TransformerIdentity,
)
from ..networks.adapters import Merge
from ..networks.operations import Operations
from ..networks.transformer import SanaTransformer
from .files import CheckpointError, TensorFile, read_json, read_tensors
from .filling import NO_MERGES, fill
from .formats import numbers_per_element
from .header import read_header, told_identity
from .kinds import describe
from .names import control_blocks, is_transformer, to_transformer_names
from .numbers import beside, check_heads, check_transformer, count_parts, number, whole
from .packing import with_packed

SIXTEEN_BITS = ("float16", "bfloat16")  # what models are released in; 8 bits only store, and float32 holds any of them
SIBLING_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # by the suffix that diffusers gives to a copy in 16 bits
# Sides in pixels that the position buffer of an official file was made for, by its length, with the position settings.
POSITIONS_2K_4K = {64**2: (64, 1.0), 128**2: (128, 2.0)}
FF_MULTIPLE = 64  # to which NVlabs' convert_sana_to_svdquant.py rounds up the inner width of the Mix-FFN, with zeros


class FoundTransformer(NamedTuple):
    """A transformer in an opened file, recognised and renamed, but not yet built."""

    identity: TransformerIdentity
    tensors: dict[str, Tensor]  # in our names
    name: str  # of the file, for errors


def load_transformer(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    operations: type | ModuleType = Operations,
) -> SanaTransformer:
    """A SANA transformer from an official `.pth`, a `.safetensors` in any naming, or a diffusers folder.

    dtype: of the weights; None: as in the file. variant: a name from VARIANTS, for a file that cannot tell 1K from 2K or 4K.
    Raises CheckpointError if the file is no SANA transformer or lacks tensors, ValueError for an unknown variant.
    """
    return build_transformer(find_transformer(read_tensors(path, "transformer"), variant), dtype, device, operations)


def build_transformer(
    found: FoundTransformer,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    operations: type | ModuleType = Operations,
    merges: Mapping[str, Merge] = NO_MERGES,
) -> SanaTransformer:
    """The network with its weights. merges: as for `fill`. Raises CheckpointError if it lacks tensors."""
    network = SanaTransformer(found.identity.config, operations=operations, dtype=dtype, device="meta")
    return fill(network, found.tensors, found.name, dtype, device, merges)


def find_transformer(file: TensorFile, variant: str | None = None) -> FoundTransformer:
    """The transformer in a file, with packed weights where it is quantised, and what it is. Raises as `load_transformer`."""
    return _found(with_packed(file) if is_transformer(file.tensors) else file, variant)


def identify_transformer(file: TensorFile, variant: str | None = None) -> TransformerIdentity:
    """What the transformer in a file is that the host will load, which may know more formats. Raises as `load_transformer`."""
    return _found(file, variant).identity


def _found(file: TensorFile, variant: str | None) -> FoundTransformer:
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    tensors = transformer_tensors(file)
    return FoundTransformer(_identity(tensors, file, variant), tensors, file.path.name)


def _identity(tensors: Mapping[str, Tensor], file: TensorFile, variant: str | None) -> TransformerIdentity:
    """The given variant; without one what the header tells, else what the tensors and the configuration do."""
    header = read_header(file)
    told = None if variant else told_identity(header)
    if told is not None:
        _check_told(told, file.path.name)
        return replace(told, dtype=_release_dtype(told.dtype, told.variant))
    if variant is None:
        found = _complete_identity(detect_transformer(tensors, file), _stored_dtype(tensors, file), file)
    else:
        found = _given_identity(variant, tensors, file)
    return replace(found, guidance_scale=_guidance_scale(header, file))


def _check_told(told: TransformerIdentity, name: str) -> None:
    """Raises CheckpointError for numbers that no header of ours tells."""
    check_transformer(told.config, name)
    check_heads(told.config.hidden_size, told.config.cross_heads, name)
    numbers, place = asdict(told), f"the header of {name}"
    whole(numbers, "base_size", place)
    number(numbers, "flow_shift", place)
    number(numbers, "guidance_scale", place)


def _release_dtype(stored: str, variant: str) -> str:
    """The precision of the release of numbers stored as this dtype."""
    if stored in SIXTEEN_BITS:
        return stored
    return VARIANTS[variant].dtype if variant in VARIANTS else "bfloat16"


def _given_identity(variant: str, tensors: Mapping[str, Tensor], file: TensorFile) -> TransformerIdentity:
    """A row of VARIANTS. Raises CheckpointError if its network is not that of the tensors, but for what these cannot tell."""
    row = VARIANTS[variant]
    found = detect_transformer(tensors, file, row.transformer.cross_heads)
    if not _is_padded_or_same(found, _with_positions(row.transformer, found)):
        raise CheckpointError(
            f"{file.path.name} has {found.depth} blocks of width {found.hidden_size} and is no {variant}; give the variant "
            "that it is, or none"
        )
    config = replace(row.transformer, ff_width=found.ff_width)
    return TransformerIdentity(config, variant, row.base_size, row.flow_shift, row.dtype, "the given variant")


def _with_positions(released: TransformerConfig, found: TransformerConfig) -> TransformerConfig:
    """A released network with the position table of another, which leaves no trace in converted files."""
    return replace(released, position_base=found.position_base, position_interpolation=found.position_interpolation)


def _is_padded_or_same(found: TransformerConfig, released: TransformerConfig) -> bool:
    """Whether a network is a released one, as it is or with a Mix-FFN that a converter has made wider without effect."""
    padded = math.ceil(released.ff_width / FF_MULTIPLE) * FF_MULTIPLE
    return found in (released, replace(released, ff_width=padded))


def _complete_identity(config: TransformerConfig, stored: str, file: TensorFile) -> TransformerIdentity:
    """Base size and flow shift from the configuration beside the tensors, a buffer among them, or the table."""
    base_size, origin = _told_size(file)
    flow_shift = None if config.guidance_embed else _sibling_flow_shift(file)
    rows = [
        (name, row)
        for name, row in VARIANTS.items()
        if _is_padded_or_same(config, row.transformer) and base_size in (None, row.base_size)
    ]
    if not rows:
        default = None if config.guidance_embed else DEFAULT_FLOW_SHIFT
        dtype = _release_dtype(stored, "custom")
        return TransformerIdentity(config, "custom", base_size or 1024, flow_shift or default, dtype, origin)
    name, row = next((found for found in rows if found[1].dtype == stored), rows[0])
    # Converters wrote 3.0 beside every model below 4096 px, also beside one that was trained with another value.
    if flow_shift is None or flow_shift == DEFAULT_FLOW_SHIFT:
        flow_shift = row.flow_shift
    return TransformerIdentity(config, name, row.base_size, flow_shift, _release_dtype(stored, name), origin)


def _told_size(file: TensorFile) -> tuple[int | None, str]:
    """The base size that the configuration beside the tensors or a buffer among them tells, if one does, and which."""
    sample_size, buffer = whole(file.config, "sample_size", beside(file.path.name)), _position_buffer(file)
    if sample_size is not None:
        return sample_size * DOWNSAMPLE, "config.json"
    if buffer:
        return math.isqrt(buffer) * DOWNSAMPLE, "its position buffer"
    return None, "the table, since the file does not say"


def possible_sizes(file: TensorFile) -> list[int]:
    """The sizes in pixels for which the transformer in a file may have been released, by all that the file tells.

    More than one: only a person can tell which variant it is. None: it is no released one. Raises as `load_transformer`.
    """
    told = told_identity(read_header(file))
    if told is not None:
        return [told.base_size]
    config = detect_transformer(transformer_tensors(file), file)
    base_size, _ = _told_size(file)
    return sorted(
        {
            row.base_size
            for row in VARIANTS.values()
            if base_size in (None, row.base_size)
            and _is_padded_or_same(config, _with_positions(row.transformer, config))
        }
    )


def _stored_dtype(tensors: Mapping[str, Tensor], file: TensorFile) -> str:
    """The dtype of most numbers; if that is float32, of the copy in 16 bits beside the file, if there is one such."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    stored = max(counts, key=counts.__getitem__)
    beside = [dtype for suffix, dtype in SIBLING_DTYPES.items() if suffix in file.siblings]
    return beside[0] if stored == "float32" and len(beside) == 1 else stored


def _position_buffer(file: TensorFile) -> int:
    """Length of the position buffer of an official file; 0: there is none."""
    lengths = (
        tensor.shape[1] for name, tensor in file.tensors.items() if name.endswith("pos_embed") and tensor.ndim == 3
    )
    return next(lengths, 0)


def _sibling_flow_shift(file: TensorFile) -> float | None:
    """From the scheduler of a diffusers pipeline folder."""
    folder = file.path if file.path.is_dir() else file.path.parent
    path = folder.parent / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path)
    return number(scheduler, "flow_shift", str(path)) or number(scheduler, "shift", str(path))


def _guidance_scale(header: Mapping[str, object], file: TensorFile) -> float:
    """What the header or the configuration tells under `guidance_scale`, a key of ours; else that of the released models."""
    name = file.path.name
    told = number(header, "guidance_scale", f"the header of {name}")
    return told or number(file.config, "guidance_scale", beside(name)) or DEFAULT_GUIDANCE_SCALE


def detect_transformer(
    tensors: Mapping[str, Tensor], file: TensorFile, cross_heads: int | None = None
) -> TransformerConfig:
    """The network, from tensors in our names and the configuration beside them. Raises CheckpointError if they cannot tell.

    cross_heads: where they are known already.
    """
    hidden_size, channels = _matrix(tensors, "patch_embed.proj.weight", file)
    _, text_width = _matrix(tensors, "caption_projection.linear_1.weight", file)
    depthwise = _tensor(tensors, "transformer_blocks.0.ff.conv_depth.weight", file)  # no matrix, so nobody packs it
    guidance_embed = any(name.startswith("time_embed.guidance_embedder.") for name in tensors)
    base, interpolation = _positions(file)
    config = TransformerConfig(
        hidden_size=hidden_size,
        depth=count_parts(tensors, "transformer_blocks", file.path.name),
        cross_heads=cross_heads or _cross_heads(hidden_size, file),
        text_width=text_width,
        channels=channels,
        ff_width=depthwise.shape[0] // 2,
        qk_norm=any(name.endswith((".norm_q.weight", ".norm_k.weight")) for name in tensors),
        guidance_embed=guidance_embed,
        continuous_time=guidance_embed or file.config.get("timestep_scale") == 0.001,
        position_base=base,
        position_interpolation=interpolation,
        control_blocks=control_blocks(file.tensors),
    )
    check_transformer(config, file.path.name)
    return config


def _matrix(tensors: Mapping[str, Tensor], name: str, file: TensorFile) -> tuple[int, int]:
    """Outputs and inputs of a matrix that tells sizes of the network, in numbers, however many of them share a byte."""
    matrix = _tensor(tensors, name, file)
    if matrix.ndim != 2:
        sizes = tuple(matrix.shape)
        raise CheckpointError(
            f"{file.path.name}: tensor {name} has shape {sizes} and is no matrix; it is another model"
        )
    rows, columns = matrix.shape
    return rows, columns * numbers_per_element(tensors, name)


def _tensor(tensors: Mapping[str, Tensor], name: str, file: TensorFile) -> Tensor:
    """A tensor that tells a size of the network."""
    if name not in tensors:
        raise CheckpointError(f"{file.path.name} lacks {name}; the download may be incomplete")
    return tensors[name]


def _cross_heads(hidden_size: int, file: TensorFile) -> int:
    """The heads of the cross-attention leave no trace in the tensors; every release has heads 112 or 72 wide."""
    heads = whole(file.config, "num_cross_attention_heads", beside(file.path.name))
    if heads is not None:
        check_heads(hidden_size, heads, file.path.name)
        return heads
    for width in (112, 72):
        if hidden_size % width == 0:
            return hidden_size // width
    raise CheckpointError(
        f"{file.path.name} has width {hidden_size}, whose number of cross-attention heads is unknown; "
        "put the model's config.json beside the file"
    )


def _positions(file: TensorFile) -> tuple[int | None, float]:
    """Base and interpolation of the position table: in the configuration, or told by the buffer of an official file."""
    interpolation = number(file.config, "interpolation_scale", beside(file.path.name))
    sample_size = whole(file.config, "sample_size", beside(file.path.name))
    if interpolation is not None and sample_size is not None:
        return sample_size, interpolation
    return POSITIONS_2K_4K.get(_position_buffer(file), (None, 1.0))


def transformer_tensors(file: TensorFile) -> dict[str, Tensor]:
    """The transformer of a file in our names. Raises CheckpointError if there is none."""
    if not is_transformer(file.tensors):
        raise CheckpointError(
            f"{file.path.name} is {describe(file.tensors)}; give a SANA transformer, such as {TRANSFORMER_SOURCE}"
        )
    return to_transformer_names(file.tensors)
