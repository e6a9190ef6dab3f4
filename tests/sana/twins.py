"""Small networks with the structure of every released one, ours and diffusers', filled with the same random numbers."""

from dataclasses import replace

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from sana.config import AUTOENCODERS, VARIANTS, AutoencoderConfig, StageConfig, TransformerConfig
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer

TEXT_WIDTH = 40
# One variant of every structure that SANA transformers come in.
STRUCTURES = (
    "sana-0.6b-1024px",
    "sana-1.6b-2048px",
    "sana-1.6b-4096px",
    "sana-1.5-1.6b-1024px",
    "sana-sprint-0.6b-1024px",
)
# One of every structure that autoencoders come in, with the smallest widths that its shortcuts and heads allow.
FAMILIES = {
    "dc-ae-f32c32-sana-1.1": (32, 64, 64, 64, 128, 128),
    "dc-ae-lite-f32c32-sana-1.1": (32, 64, 64, 64, 128, 128),
    "dc-ae-f32c32-in-1.0": (32, 64, 64, 64, 128, 128),
    "dc-ae-f64c128-in-1.0": (32, 64, 64, 64, 128, 128, 128),
    "dc-ae-f32c128-1.5": (32, 64, 64, 64, 128, 128),
}


def randomise(network: nn.Module) -> nn.Module:
    """Fill a network so that activations stay near one and no parameter is without effect."""
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if not tensor.is_floating_point() or name.endswith("pos_embed"):
                continue
            if tensor.ndim > 1 and "table" not in name:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif "norm" in name and name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=0.2)
    return network.eval().requires_grad_(False)


def tiny_config(variant: str, depth: int = 3) -> TransformerConfig:
    """The structure of a variant at width 96: three heads of 32 in self-attention, two of 48 in cross-attention."""
    row = VARIANTS[variant].transformer
    return replace(row, hidden_size=96, depth=depth, cross_heads=2, text_width=TEXT_WIDTH, ff_width=240)


def diffusers_transformer(config: TransformerConfig) -> SanaTransformer2DModel:
    """diffusers' transformer of the same structure, not yet filled."""
    return SanaTransformer2DModel(
        num_attention_heads=config.self_heads,
        attention_head_dim=32,
        num_layers=config.depth,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.hidden_size // config.cross_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.text_width,
        sample_size=config.position_base or 32,
        interpolation_scale=config.position_interpolation if config.position_base else None,
        guidance_embeds=config.guidance_embed,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
    )


def as_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of diffusers' transformer with its 1x1 convolutions as matrices."""
    return {
        name: tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[-1] == 1 else tensor
        for name, tensor in tensors.items()
    }


def transformer_pair(config: TransformerConfig) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Our transformer and diffusers' with the same weights, in the same memory."""
    theirs = randomise(diffusers_transformer(config))
    ours = SanaTransformer(config, device="meta")
    ours.load_state_dict(as_linear(theirs.state_dict()), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def tiny_autoencoder_config(name: str, depth: int = 2) -> AutoencoderConfig:
    """The structure of a family at a few channels and at most `depth` blocks a stage."""
    row, widths = AUTOENCODERS[name], FAMILIES[name]

    def shrink(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(s, width=w, depth=min(s.depth, depth)) for s, w in zip(stages, widths, strict=True))

    return replace(row, encoder=shrink(row.encoder), decoder=shrink(row.decoder), latent_channels=32)


def diffusers_autoencoder(config: AutoencoderConfig) -> AutoencoderDC:
    """diffusers' autoencoder of the same structure, not yet filled."""
    parts = {}
    for side, stages in (("encoder", config.encoder), ("decoder", config.decoder)):
        parts[f"{side}_block_types"] = tuple("EfficientViTBlock" if s.attention else "ResBlock" for s in stages)
        parts[f"{side}_block_out_channels"] = tuple(s.width for s in stages)
        parts[f"{side}_layers_per_block"] = tuple(s.depth for s in stages)
        parts[f"{side}_qkv_multiscales"] = tuple(s.scales for s in stages)
    return AutoencoderDC(
        **parts,
        latent_channels=config.latent_channels,
        attention_head_dim=32,
        upsample_block_type="interpolate" if config.nearest_up else "pixel_shuffle",
        downsample_block_type="conv" if config.strided_down else "pixel_unshuffle",
        decoder_norm_types=tuple("batch_norm" if s.batch_norm else "rms_norm" for s in config.decoder),
        decoder_act_fns=tuple(s.activation for s in config.decoder),
        encoder_out_shortcut=config.shortcuts,
        decoder_in_shortcut=config.shortcuts,
        decoder_conv_act_fn=config.out_activation,
        scaling_factor=config.latent_scale,
    )


def autoencoder_pair(config: AutoencoderConfig) -> tuple[DCAutoencoder, AutoencoderDC]:
    """Our autoencoder and diffusers' with the same weights, in the same memory."""
    theirs = randomise(diffusers_autoencoder(config))
    ours = DCAutoencoder(config, device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs
