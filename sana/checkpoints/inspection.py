"""What a checkpoint is, in words, and its conversion to one safetensors file whose header says so."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import AUTOENCODERS, VARIANTS, AutoencoderConfig, GemmaConfig
from ..networks.autoencoder import DCAutoencoder
from ..networks.transformer import SanaTransformer
from .detection import (
    TRANSFORMER_SOURCE,
    TransformerIdentity,
    autoencoder_header,
    autoencoder_tensors,
    detect_autoencoder,
    identify_transformer,
    transformer_header,
    transformer_tensors,
)
from .files import CheckpointError, TensorFile, read_tensors, replacing
from .kinds import SVDQUANT, describe
from .loading import FLOAT_DTYPES, FP8_DTYPES, check_numbers, check_tensors
from .names import control_blocks, is_autoencoder, is_transformer, with_convolutions

# What to do with some of what `kinds.describe` knows.
USES = {
    "a Gemma text encoder": "give its path as the text encoder",
    SVDQUANT: f"use {TRANSFORMER_SOURCE} instead",
    "a ControlNet for SANA": "load it with the node Load SANA ControlNet, beside a SANA transformer",
}


def describe_file(path: Path | str) -> str:
    """A few lines on a checkpoint file or folder. Raises CheckpointError if it cannot be read."""
    file = read_tensors(path, "transformer")
    name, content = file.path.name, f"{len(file.tensors)} tensors, {_amount(file)}"
    if is_transformer(file.tensors):
        return "\n".join([f"{name}: a SANA transformer", content, *_transformer_lines(identify_transformer(file))])
    if is_autoencoder(file.tensors):
        config = detect_autoencoder(autoencoder_tensors(file), file)
        return "\n".join([f"{name}: a DC-AE, the autoencoder of SANA", content, *_autoencoder_lines(config)])
    kind = describe(file.tensors)
    return "\n".join([f"{name}: {kind}", content, USES.get(kind, "it is of no use to SANA by itself")])


def convert(
    source: Path | str, target: Path | str, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> str:
    """Write the transformer or autoencoder of source as target, a safetensors file, and say what was written.

    dtype: of the numbers; None: as they are. Raises CheckpointError if source is neither, is incomplete, is quantised or holds a ControlNet, ValueError for a
    target that is no `.safetensors` file, and OSError for one that cannot be written. The target appears when it is complete, or not at all.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors; give the name of the file to write")
    file = read_tensors(source, "transformer")
    if is_transformer(file.tensors):
        identity = identify_transformer(file, variant)
        if control_blocks(file.tensors):
            raise CheckpointError(
                f"{file.path.name} holds a ControlNet too, which would be lost; use the file as it is"
            )
        tensors, network = transformer_tensors(file), SanaTransformer(identity.config, device="meta")
        header, what = transformer_header(identity), identity.variant
    elif is_autoencoder(file.tensors):
        tensors = autoencoder_tensors(file)
        config = detect_autoencoder(tensors, file)
        network = DCAutoencoder(config, device="meta")
        header, what = autoencoder_header(config), _autoencoder_name(config)
    else:
        raise CheckpointError(f"{file.path.name} is {describe(file.tensors)}; give a SANA transformer or a DC-AE")
    check_numbers(network, tensors, file.path.name, (*FLOAT_DTYPES, *FP8_DTYPES))
    check_tensors(network.state_dict(), tensors, file.path.name)
    tensors = with_convolutions(tensors)
    stored = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    try:
        with replacing(target) as unfinished:
            save_file(stored, unfinished, {"format": "pt", **header})
    except (SafetensorError, OSError) as error:
        raise OSError(f"{target} cannot be written ({error}); give another place") from error
    return f"{target}: {what}, {len(tensors)} tensors"


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else None).contiguous()


def _amount(file: TensorFile) -> str:
    numbers = sum(tensor.numel() for tensor in file.tensors.values())
    size_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})
    return f"{numbers:,} numbers in {', '.join(dtypes)}, {size_bytes / 1e9:.2f} GB"


def _transformer_lines(identity: TransformerIdentity) -> list[str]:
    config, row = identity.config, VARIANTS.get(identity.variant)
    release = f", as {row.source}" if row else ""
    traits = [f"{config.depth} blocks of width {config.hidden_size}"]
    traits += ["query and key norms"] if config.qk_norm else []
    traits += ["a guidance embedding"] if config.guidance_embed else []
    traits += ["a position table"] if config.position_base else []
    traits += [f"a ControlNet of {config.control_blocks} blocks"] if config.control_blocks else []
    encoder = (
        "Gemma-2-2b-it"
        if config.text_width == GemmaConfig().hidden_size
        else f"a text encoder of width {config.text_width}"
    )
    shift = "no flow shift (Sprint)" if identity.flow_shift is None else f"flow shift {identity.flow_shift:g}"
    return [
        f"{identity.variant}{release}: {', '.join(traits)}",
        f"made for {identity.base_size} px (from {identity.origin}), {shift}, guidance {identity.guidance_scale:g}",
        f"compute in {identity.dtype} or float32; needs a DC-AE f32c32 and {encoder}",
    ]


def _autoencoder_lines(config: AutoencoderConfig) -> list[str]:
    widths = "-".join(str(stage.width) for stage in config.decoder)
    return [
        f"{_autoencoder_name(config)}: {config.downsample} px per latent cell, {config.latent_channels} channels",
        f"decoder widths {widths}, blocks {'-'.join(str(stage.depth) for stage in config.decoder)}",
        f"latents times {config.latent_scale:g} for the transformer; compute in bfloat16 or float32",
    ]


def _autoencoder_name(config: AutoencoderConfig) -> str:
    return next((name for name, row in AUTOENCODERS.items() if row == config), "custom")
