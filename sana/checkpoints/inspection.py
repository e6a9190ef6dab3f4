"""What a checkpoint is, in words."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..config import TRANSFORMER_SOURCE, VARIANTS, AutoencoderConfig, GemmaConfig, TransformerIdentity
from ..networks.packed import PackedWeight
from .adapters import is_lora
from .autoencoder import autoencoder_name, autoencoder_tensors, detect_autoencoder
from .files import TensorFile, read_tensors
from .gguf_container import is_gguf
from .gguf_files import read_gguf
from .kinds import ADAPTER, QUANTO, SVDQUANT, UNMERGED, describe
from .lora import read_lora
from .lora_inspection import lora_lines
from .names import is_autoencoder, is_transformer
from .packing import format_name, packed_kinds, with_packed
from .text_encoder import is_gemma
from .transformer import find_transformer

# What to do with some of what `kinds.describe` knows.
USES = {
    "a Gemma text encoder": "give its path as the text encoder",
    QUANTO: f"use {TRANSFORMER_SOURCE} instead",
    UNMERGED: "merge the adapter and save the model again, or load the adapter as a LoRA beside the model it is for",
    ADAPTER: "use it with a LoRA loader in ComfyUI",
    SVDQUANT: f"use {TRANSFORMER_SOURCE} instead",
    "a ControlNet for SANA": "use it with a SANA transformer: --control in the shell, the node Load SANA ControlNet in ComfyUI",
}


def describe_file(path: Path | str, model: Path | str | None = None) -> str:
    """A few lines on a checkpoint file or folder.

    model: for a LoRA, the SANA that it is to fit. Raises CheckpointError if either cannot be read, and ValueError for a model
    beside something else than a LoRA.
    """
    file = read_gguf(path) if is_gguf(path) else read_tensors(path, "transformer")
    if model is not None and not is_lora(file.tensors):
        raise ValueError(f"--model says what a LoRA is to fit, and {file.path.name} is no LoRA; leave it out")
    name, content = file.path.name, f"{len(file.tensors)} tensors, {_amount(file)}"
    if is_transformer(file.tensors):
        found = find_transformer(file)
        packed = _packed_lines(found.tensors)
        return "\n".join([f"{name}: a SANA transformer", content, *packed, *_transformer_lines(found.identity)])
    if is_autoencoder(file.tensors):
        config = detect_autoencoder(autoencoder_tensors(file), file)
        return "\n".join([f"{name}: a DC-AE, the autoencoder of SANA", content, *_autoencoder_lines(config)])
    kind = describe(file.tensors)
    if is_lora(file.tensors):
        return "\n".join([f"{name}: a LoRA", content, *lora_lines(read_lora(path), model)])
    packed = _packed_lines(with_packed(file).tensors) if is_gemma(file.tensors) else []
    return "\n".join([f"{name}: {kind}", content, *packed, USES.get(kind, "it is of no use to SANA by itself")])


def _amount(file: TensorFile) -> str:
    numbers = sum(tensor.numel() for tensor in file.tensors.values())
    size_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    dtypes = sorted({format_name(tensor) for tensor in file.tensors.values()})
    return f"{numbers:,} numbers in {', '.join(dtypes)}, {size_bytes / 1e9:.2f} GB"


def _packed_lines(tensors: Mapping[str, Tensor | PackedWeight]) -> list[str]:
    """How many matrices are quantised and how; none if none is."""
    kinds = ", ".join(packed_kinds(tensors))
    return [f"quantised matrices: {kinds}"] if kinds else []


def _transformer_lines(identity: TransformerIdentity) -> list[str]:
    config, row = identity.config, VARIANTS.get(identity.variant)
    release = f", as {row.source}" if row else ""
    traits = [f"{config.depth} blocks of width {config.hidden_size}"]
    traits += ["query and key norms"] if config.qk_norm else []
    traits += ["a guidance embedding"] if config.guidance_embed else []
    traits += ["a position table"] if config.position_base else []
    traits += [f"a Mix-FFN padded to {config.ff_width}"] if row and config.ff_width != row.transformer.ff_width else []
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
        f"{autoencoder_name(config)}: {config.downsample} px per latent cell, {config.latent_channels} channels",
        f"decoder widths {widths}, blocks {'-'.join(str(stage.depth) for stage in config.decoder)}",
        f"latents times {config.latent_scale:g} for the transformer; compute in bfloat16 or float32",
    ]
