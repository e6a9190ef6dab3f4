"""Which transformer or autoencoder a file holds.

The variant is read from the tensors, never from the file name. What tensors cannot tell, the size a model was trained for,
its flow shift and the guidance that suits it, comes from the header of a file we wrote, from the configuration beside it, or from
the table of variants, which all have one guidance.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TypeVar, get_type_hints

import torch
from torch import Tensor

from ..config import AUTOENCODERS, DOWNSAMPLE, HEAD_WIDTH, VARIANTS, AutoencoderConfig, StageConfig, TransformerConfig
from .files import CheckpointError, TensorFile, read_json
from .kinds import describe
from .names import (
    HEADER_TENSOR,
    control_blocks,
    dialect_prefix,
    is_autoencoder,
    is_transformer,
    to_autoencoder_names,
    to_transformer_names,
)

TRANSFORMER_SOURCE = VARIANTS["sana-1.6b-1024px"].source  # for who has none
AUTOENCODER_SOURCE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
HEADER = "sana"  # key of our entry in a safetensors header: JSON of what the tensors cannot tell
DEFAULT_FLOW_SHIFT = 3.0
DEFAULT_GUIDANCE_SCALE = 4.5  # of the official demo, for every release
SIXTEEN_BITS = ("float16", "bfloat16")  # what models are released in; 8 bits only store, and float32 holds any of them
SIBLING_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # by the suffix that diffusers gives to a copy in 16 bits
# Sides in pixels that the position buffer of an official file was made for, by its length, with the position settings.
POSITIONS_2K_4K = {64**2: (64, 1.0), 128**2: (128, 2.0)}

Filled = TypeVar("Filled")


@dataclass(frozen=True)
class TransformerIdentity:
    """What a transformer is, and what its tensors cannot tell."""

    config: TransformerConfig
    variant: str  # a row of VARIANTS, or "custom"
    base_size: int  # pixels
    flow_shift: float | None  # None: Sprint
    dtype: str  # precision of the release: that of the file if it has 16 bits, else of the table
    origin: str  # where the base size was found
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE  # to draw with unless told otherwise


def identify_transformer(file: TensorFile, variant: str | None = None) -> TransformerIdentity:
    """What the transformer in a file is. Raises as `load_transformer` does."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    tensors, header = transformer_tensors(file), read_header(file)
    told = None if variant else _told_identity(header)
    if told is not None:
        return told
    if variant is None:
        found = _complete_identity(detect_transformer(tensors, file), _stored_dtype(tensors, file), file)
    else:
        found = _given_identity(variant, tensors, file)
    return replace(found, guidance_scale=_guidance_scale(header, file))


def _told_identity(header: Mapping[str, object]) -> TransformerIdentity | None:
    """What a header tells, but for a dtype that no model was released in; None: it is none of ours."""
    config = _filled(TransformerConfig, header.get("config"))
    told = _filled(TransformerIdentity, {**header, "config": config, "origin": "its header"})
    return told and replace(told, dtype=_release_dtype(told.dtype, told.variant))


def _release_dtype(stored: str, variant: str) -> str:
    """The precision of the release of numbers stored as this dtype."""
    if stored in SIXTEEN_BITS:
        return stored
    return VARIANTS[variant].dtype if variant in VARIANTS else "bfloat16"


def _filled(kind: type[Filled], values: object) -> Filled | None:
    """A dataclass of the values that are its fields, since a later version may have written more.

    None: a value is of another type than its field, or one is missing that has no default.
    """
    if not isinstance(values, Mapping):
        return None
    types = get_type_hints(kind)
    known = {name: values[name] for name in types if name in values}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    fit = all(_is_a(value, types[name]) for name, value in known.items())
    return kind(**known) if fit and needed <= known.keys() else None


def _is_a(value: object, kind: type) -> bool:
    """Whether a value has a type; JSON writes numbers without a fraction as integers."""
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def _given_identity(variant: str, tensors: Mapping[str, Tensor], file: TensorFile) -> TransformerIdentity:
    """A row of VARIANTS. Raises CheckpointError if its network is not that of the tensors, but for what these cannot tell."""
    row = VARIANTS[variant]
    found = detect_transformer(tensors, file, row.transformer.cross_heads)
    fitting = replace(
        row.transformer, position_base=found.position_base, position_interpolation=found.position_interpolation
    )
    if fitting != found:
        raise CheckpointError(
            f"{file.path.name} has {found.depth} blocks of width {found.hidden_size} and is no {variant}; give the variant "
            "that it is, or none"
        )
    return TransformerIdentity(row.transformer, variant, row.base_size, row.flow_shift, row.dtype, "the given variant")


def _complete_identity(config: TransformerConfig, stored: str, file: TensorFile) -> TransformerIdentity:
    """Base size and flow shift from the configuration beside the tensors, a buffer among them, or the table."""
    sample_size, buffer = file.config.get("sample_size"), _position_buffer(file)
    if isinstance(sample_size, int):
        base_size, origin = sample_size * DOWNSAMPLE, "config.json"
    elif buffer:
        base_size, origin = math.isqrt(buffer) * DOWNSAMPLE, "its position buffer"
    else:
        base_size, origin = None, "the table, since the file does not say"
    flow_shift = None if config.guidance_embed else _sibling_flow_shift(file)
    rows = [
        (name, row)
        for name, row in VARIANTS.items()
        if row.transformer == config and base_size in (None, row.base_size)
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
    scheduler = read_json(folder.parent / "scheduler" / "scheduler_config.json")
    value = scheduler.get("flow_shift", scheduler.get("shift"))
    return float(value) if isinstance(value, int | float) else None


def _guidance_scale(header: Mapping[str, object], file: TensorFile) -> float:
    """The key `guidance_scale` of a header or of the configuration, where diffusers does not know it; else the released models'."""
    value = header.get("guidance_scale", file.config.get("guidance_scale"))
    return float(value) if type(value) in (int, float) else DEFAULT_GUIDANCE_SCALE


def detect_transformer(
    tensors: Mapping[str, Tensor], file: TensorFile, cross_heads: int | None = None
) -> TransformerConfig:
    """The network, from tensors in our names and the configuration beside them. Raises CheckpointError if they cannot tell.

    cross_heads: where they are known already.
    """
    hidden_size, channels = _matrix(tensors, "patch_embed.proj.weight", file)
    _, text_width = _matrix(tensors, "caption_projection.linear_1.weight", file)
    _, ff_width = _matrix(tensors, "transformer_blocks.0.ff.conv_point.weight", file)
    guidance_embed = any(name.startswith("time_embed.guidance_embedder.") for name in tensors)
    base, interpolation = _positions(file)
    return TransformerConfig(
        hidden_size=hidden_size,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")),
        cross_heads=cross_heads or _cross_heads(hidden_size, file),
        text_width=text_width,
        channels=channels,
        ff_width=ff_width,
        qk_norm=any(name.endswith((".norm_q.weight", ".norm_k.weight")) for name in tensors),
        guidance_embed=guidance_embed,
        continuous_time=guidance_embed or file.config.get("timestep_scale") == 0.001,
        position_base=base,
        position_interpolation=interpolation,
        control_blocks=control_blocks(file.tensors),
    )


def _matrix(tensors: Mapping[str, Tensor], name: str, file: TensorFile) -> torch.Size:
    """Rows and columns of a matrix that tells a size of the network."""
    if name not in tensors:
        raise CheckpointError(f"{file.path.name} lacks {name}; the download may be incomplete")
    if tensors[name].ndim != 2:
        sizes = tuple(tensors[name].shape)
        raise CheckpointError(
            f"{file.path.name}: tensor {name} has shape {sizes} and is no matrix; it is another model"
        )
    return tensors[name].shape


def _cross_heads(hidden_size: int, file: TensorFile) -> int:
    """The heads of the cross-attention leave no trace in the tensors; every release has heads 112 or 72 wide."""
    heads = file.config.get("num_cross_attention_heads")
    if isinstance(heads, int):
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
    interpolation, sample_size = file.config.get("interpolation_scale"), file.config.get("sample_size")
    if isinstance(interpolation, int | float) and isinstance(sample_size, int):
        return sample_size, float(interpolation)
    return POSITIONS_2K_4K.get(_position_buffer(file), (None, 1.0))


def detect_autoencoder(tensors: Mapping[str, Tensor], file: TensorFile) -> AutoencoderConfig:
    """The autoencoder, from tensors in our names and the configuration beside them."""
    encoder, decoder = _stages(tensors, "encoder.down_blocks", file), _stages(tensors, "decoder.up_blocks", file)
    attention = any(stage.attention for stage in encoder)
    config = AutoencoderConfig(
        encoder=encoder,
        decoder=decoder,
        latent_channels=_kernel(tensors, r"decoder\.conv_in\.weight", file).shape[1],
        strided_down=_kernel(tensors, r"encoder\.down_blocks\.1\.\d+\.conv\.weight", file).shape[0] == encoder[2].width,
        nearest_up=_kernel(tensors, r"decoder\.up_blocks\.1\.\d+\.conv\.weight", file).shape[0] == decoder[1].width,
        shortcuts=attention,  # only DC-AE 1.5 has neither
        out_activation="relu" if any(stage.attention for stage in decoder) else "silu",
    )
    scale = file.config.get("scaling_factor", read_header(file).get("latent_scale"))
    if type(scale) not in (int, float):
        rows = [row for row in AUTOENCODERS.values() if replace(row, latent_scale=config.latent_scale) == config]
        scale = rows[0].latent_scale if rows else config.latent_scale
    return replace(config, latent_scale=float(scale))


def _stages(tensors: Mapping[str, Tensor], root: str, file: TensorFile) -> tuple[StageConfig, ...]:
    found = {int(match[1]) for name in tensors if (match := re.match(re.escape(root) + r"\.(\d+)\.", name))}
    stages = [_stage(tensors, f"{root}.{i}.") for i in range(max(found, default=0) + 1)]
    if len(stages) < 3 or None in stages[1:]:
        raise CheckpointError(f"{file.path.name} lacks tensors of {root}; the download may be incomplete")
    if stages[0] is None:  # it left no tensor; every family doubles the width in the next stage
        stages[0] = replace(stages[1], width=stages[1].width // 2, depth=0)
    for i, stage in enumerate(stages):
        if stage.attention and (stage.width < HEAD_WIDTH or stage.width % HEAD_WIDTH):
            raise CheckpointError(
                f"{file.path.name}: {root}.{i} has {stage.width} channels, which are not heads of {HEAD_WIDTH}; it is another model"
            )
    return tuple(stages)


def _stage(tensors: Mapping[str, Tensor], prefix: str) -> StageConfig | None:
    """The stage whose tensors begin with prefix; None if it is empty."""
    names = [name for name in tensors if name.startswith(prefix)]
    inside = [name for name in names if not re.fullmatch(r"\d+\.conv\.(weight|bias)", name.removeprefix(prefix))]
    attention = any(".attn." in name for name in inside)
    ends = ".attn.to_out.weight" if attention else ".conv1.weight"
    widths = [tensors[name].shape[0] for name in inside if name.endswith(ends) and tensors[name].ndim]
    if not widths:
        return None
    scales = {name.split("to_qkv_multiscale.")[1]: tensors[name] for name in inside if name.endswith(".proj_in.weight")}
    batch_norm = any(name.endswith("running_mean") for name in inside)
    return StageConfig(
        width=widths[0],
        depth=len({name.removeprefix(prefix).split(".")[0] for name in inside}),
        attention=attention,
        scales=tuple(kernel.shape[-1] for kernel in scales.values() if kernel.ndim),
        batch_norm=batch_norm,
        activation="relu" if batch_norm else "silu",  # they come together, in the first DC-AE family
    )


def _kernel(tensors: Mapping[str, Tensor], pattern: str, file: TensorFile) -> Tensor:
    """The convolution kernel with a name of this pattern."""
    found = [name for name in tensors if re.fullmatch(pattern, name)]
    if not found:
        plain = pattern.replace("\\d+", "*").replace("\\", "")
        raise CheckpointError(f"{file.path.name} lacks {plain}; the download may be incomplete")
    if tensors[found[0]].ndim != 4:
        sizes = tuple(tensors[found[0]].shape)
        raise CheckpointError(
            f"{file.path.name}: tensor {found[0]} has shape {sizes} and is no convolution; it is another model"
        )
    return tensors[found[0]]


def transformer_tensors(file: TensorFile) -> dict[str, Tensor]:
    """The transformer of a file in our names. Raises CheckpointError if there is none."""
    if not is_transformer(file.tensors):
        raise CheckpointError(
            f"{file.path.name} is {describe(file.tensors)}; give a SANA transformer, such as {TRANSFORMER_SOURCE}"
        )
    return to_transformer_names(file.tensors)


def autoencoder_tensors(file: TensorFile) -> dict[str, Tensor]:
    """The autoencoder of a file in our names. Raises CheckpointError if there is none."""
    if not is_autoencoder(file.tensors):
        raise CheckpointError(
            f"{file.path.name} is {describe(file.tensors)}; give a DC-AE, such as dc-ae-f32c32-sana-1.1 from "
            f"{AUTOENCODER_SOURCE}"
        )
    return to_autoencoder_names(file.tensors)


def transformer_header(identity: TransformerIdentity) -> dict[str, str]:
    """The entry for a safetensors header that makes a transformer tell what its tensors cannot."""
    told = {name: value for name, value in asdict(identity).items() if name != "origin"}
    return {HEADER: json.dumps(told)}


def autoencoder_header(config: AutoencoderConfig) -> dict[str, str]:
    return {HEADER: json.dumps({"latent_scale": config.latent_scale})}


def header_tensor(identity: TransformerIdentity) -> Tensor:
    """The same as a tensor of bytes, for hosts that save tensors but no header."""
    return torch.frombuffer(bytearray(transformer_header(identity)[HEADER].encode()), dtype=torch.uint8)


def read_header(file: TensorFile) -> dict[str, object]:
    """What `transformer_header`, `autoencoder_header` or `header_tensor` wrote; {} if none did."""
    stored = file.metadata.get(HEADER) or stored_bytes(file, HEADER_TENSOR) or b"{}"
    try:
        found = json.loads(stored)
    except ValueError:  # an entry of somebody else
        return {}
    return found if isinstance(found, dict) else {}


def stored_bytes(file: TensorFile, name: str) -> bytes | None:
    """What a tensor of bytes holds, under whatever prefix; None: there is none.

    Scripts that cast a whole checkpoint cast it too, which 16 bits bear. Raises CheckpointError for less.
    """
    prefix = dialect_prefix(file.tensors, name)
    if prefix is None:
        return None
    tensor = file.tensors[prefix + name]
    if tensor.dtype != torch.uint8 and tensor.dtype.itemsize == 1:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file.path.name} holds {prefix}{name}, a tensor of bytes, in {dtype}, which rounds them; cast only the weights "
            "of the original file"
        )
    return tensor.to("cpu", torch.uint8).contiguous().numpy().tobytes()
