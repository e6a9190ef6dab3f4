"""Checkpoints to files: one converted file, or a folder in the layout of a diffusers pipeline. The readers read what this writes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import (
    DEFAULT_GUIDANCE_SCALE,
    DOWNSAMPLE,
    HEAD_WIDTH,
    TEXT_TOKENS,
    AutoencoderConfig,
    StageConfig,
    TransformerConfig,
    TransformerIdentity,
)
from ..networks.adapters import Merge
from ..networks.autoencoder import DCAutoencoder
from ..networks.packed import PackedWeight
from ..networks.transformer import SanaTransformer
from ..saving import remove_leftovers, replacing, write_json
from ..text.text_encoder import GemmaTextEncoder
from .adapters import is_lora
from .autoencoder import autoencoder_name, autoencoder_tensors, detect_autoencoder
from .files import CheckpointError, read_tensors
from .filling import FLOAT_DTYPES, check_numbers, check_tensors
from .header import autoencoder_header, transformer_header
from .kinds import describe
from .lora import Merges, read_merges
from .lora_writing import lora_in_diffusers_layout
from .modelspec import TEXT_ENCODER, modelspec
from .names import control_blocks, is_autoencoder, is_transformer, with_convolutions
from .packing import FP8_DTYPES
from .text_encoder import gemma_json
from .transformer import find_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(
    source: Path | str,
    target: Path | str,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    loras: Sequence[tuple[Path | str, float]] = (),
) -> str:
    """Write the transformer, autoencoder or LoRA of source as target, a safetensors file, and say what was written.

    dtype: of the numbers; None: as they are, which quantised ones cannot be but for float8 without scales. loras: to merge
    into a transformer, each with its strength. Raises CheckpointError if source is none of these, is incomplete or holds a
    ControlNet, and as `read_merges` and `lora_in_diffusers_layout` do, ValueError for a target that is no `.safetensors`
    file, and OSError for one that cannot be written. The target appears when it is complete, or not at all.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors; give the name of the file to write")
    file = read_tensors(source, "transformer")
    if loras and not is_transformer(file.tensors):
        raise CheckpointError(f"{file.path.name} is {describe(file.tensors)}; a LoRA is merged into a SANA transformer")
    merges: Merges = {}
    if is_transformer(file.tensors):
        identity, tensors, _ = find_transformer(file, variant)
        if control_blocks(file.tensors):
            raise CheckpointError(
                f"{file.path.name} holds a ControlNet too, which would be lost; use the file as it is"
            )
        network = SanaTransformer(identity.config, device="meta")
        header, what = transformer_header(identity), identity.variant
        merges, _ = read_merges(loras, identity.config, None)
    elif is_autoencoder(file.tensors):
        tensors = autoencoder_tensors(file)
        config = detect_autoencoder(tensors, file)
        network = DCAutoencoder(config, device="meta")
        what = autoencoder_name(config)
        header = autoencoder_header(config, what)
    elif is_lora(file.tensors):
        tensors, header, what = lora_in_diffusers_layout(source, dtype, variant)
        _save(tensors, target, header)
        return f"{target}: {what}"
    else:
        raise CheckpointError(
            f"{file.path.name} is {describe(file.tensors)}; give a SANA transformer, a DC-AE or a LoRA"
        )
    check_numbers(network, tensors, file.path.name, (*FLOAT_DTYPES, *FP8_DTYPES))
    expected = network.state_dict()
    check_tensors(expected, tensors, file.path.name)
    packed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, PackedWeight)}
    kept = {str(fp8).removeprefix("torch.") for fp8 in FP8_DTYPES}
    lost = {weight.kind for name, weight in packed.items() if weight.kind not in kept or name in merges}
    if lost and dtype is None:
        raise CheckpointError(
            f"{file.path.name} has weights in {', '.join(sorted(lost))}; unpack them by --dtype bfloat16"
        )
    for name, weight in packed.items():
        weight.cut_to(expected[name].shape).changes.extend([merges[name]] if name in merges else [])
    stored = {name: _stored(tensor, dtype, merges.get(name)) for name, tensor in tensors.items()}
    _save(with_convolutions(stored), target, header)
    return f"{target}: {what}, {len(tensors)} tensors"


def _save(tensors: dict[str, Tensor], target: Path, header: dict[str, str]) -> None:
    remove_leftovers(target.parent)
    with replacing(target) as unfinished:
        save_file(tensors, unfinished, {"format": "pt", **header})


def write_pipeline(
    folder: Path,
    transformer: SanaTransformer,
    autoencoder: DCAutoencoder,
    text_encoder: GemmaTextEncoder,
    *,
    tokenizer: Path,
    identity: TransformerIdentity,
) -> None:
    """Write a whole model. The transformer and the autoencoder are stored as float16, the text encoder as float32."""
    write_transformer(folder / "transformer", transformer, identity, torch.float16)
    vae = {"_class_name": "AutoencoderDC", **autoencoder_json(autoencoder.config)}
    vae_header = autoencoder_header(autoencoder.config, autoencoder_name(autoencoder.config))
    _write(folder / "vae", WEIGHTS, autoencoder.state_dict(), vae, torch.float16, vae_header)
    gemma = text_encoder.model
    gemma_header = modelspec(TEXT_ENCODER, "Gemma-2")
    settings = gemma_json(gemma.config)
    _write(folder / "text_encoder", "model.safetensors", gemma.state_dict(), settings, torch.float32, gemma_header)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(identity.flow_shift))
    write_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    with replacing(folder / "tokenizer" / "tokenizer.json") as unfinished:
        unfinished.write_bytes(tokenizer.read_bytes())
    write_json(folder / "model_index.json", INDEX)


def write_transformer(
    folder: Path, transformer: SanaTransformer, identity: TransformerIdentity, dtype: torch.dtype
) -> None:
    """Write a transformer alone, as the folder `transformer` of a pipeline. Its header tells what no tensor does."""
    config = {"_class_name": "SanaTransformer2DModel", **transformer_json(transformer.config, identity.base_size)}
    if identity.guidance_scale != DEFAULT_GUIDANCE_SCALE:
        config["guidance_scale"] = identity.guidance_scale  # diffusers warns of a key that it does not know
    written = replace(identity, config=transformer.config, dtype=str(dtype).removeprefix("torch."))
    _write(folder, WEIGHTS, with_convolutions(transformer.state_dict()), config, dtype, transformer_header(written))


def transformer_json(config: TransformerConfig, base_size: int) -> dict[str, object]:
    """The configuration of diffusers' SanaTransformer2DModel."""
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_attention_heads": config.self_heads,
        "attention_head_dim": HEAD_WIDTH,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.hidden_size // config.cross_heads,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.text_width,
        "mlp_ratio": config.ff_width / config.hidden_size,
        "sample_size": base_size // DOWNSAMPLE,
        "interpolation_scale": config.position_interpolation if config.position_base else None,
        "guidance_embeds": config.guidance_embed,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "timestep_scale": 0.001 if config.continuous_time and not config.guidance_embed else 1.0,
    }


def autoencoder_json(config: AutoencoderConfig) -> dict[str, object]:
    """The configuration of diffusers' AutoencoderDC."""
    return {
        "latent_channels": config.latent_channels,
        "attention_head_dim": HEAD_WIDTH,
        **_stages_json("encoder", config.encoder),
        **_stages_json("decoder", config.decoder),
        "decoder_norm_types": ["batch_norm" if stage.batch_norm else "rms_norm" for stage in config.decoder],
        "decoder_act_fns": [stage.activation for stage in config.decoder],
        "downsample_block_type": "conv" if config.strided_down else "pixel_unshuffle",
        "upsample_block_type": "interpolate" if config.nearest_up else "pixel_shuffle",
        "encoder_out_shortcut": config.shortcuts,
        "decoder_in_shortcut": config.shortcuts,
        "decoder_conv_act_fn": config.out_activation,
        "scaling_factor": config.latent_scale,
    }


def _stages_json(side: str, stages: tuple[StageConfig, ...]) -> dict[str, object]:
    return {
        f"{side}_block_types": ["EfficientViTBlock" if stage.attention else "ResBlock" for stage in stages],
        f"{side}_block_out_channels": [stage.width for stage in stages],
        f"{side}_layers_per_block": [stage.depth for stage in stages],
        f"{side}_qkv_multiscales": [list(stage.scales) for stage in stages],
    }


def scheduler_json(flow_shift: float) -> dict[str, object]:
    """The configuration of diffusers' DPMSolverMultistepScheduler that is Flow-DPM-Solver."""
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow_shift,
    }


# As Gemma's own says it: diffusers pads on the right, up to 300 tokens.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "padding_side": "right",
    "model_max_length": TEXT_TOKENS,
}
INDEX = {
    "_class_name": "SanaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def _write(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    config: dict[str, object],
    dtype: torch.dtype,
    header: dict[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: tensor.detach().cpu().to(dtype).contiguous() for key, tensor in tensors.items()}
    with replacing(folder / name) as unfinished:
        save_file(stored, unfinished, {"format": "pt", **header})
    write_json(folder / "config.json", config)


def _stored(tensor: Tensor | PackedWeight, dtype: torch.dtype | None, merge: Merge | None = None) -> Tensor:
    if isinstance(tensor, PackedWeight):  # which has its own changes
        return tensor.parts["packed"].view(tensor.shape) if dtype is None else tensor(dtype)
    merged = merge(tensor) if merge else tensor
    return merged.to((dtype or tensor.dtype) if tensor.is_floating_point() else None).contiguous()
