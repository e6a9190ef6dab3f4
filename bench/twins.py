"""Ours and the reference's network of one configuration, sharing one set of random weights."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from sana.checkpoints.text_encoder import gemma_json
from sana.config import AutoencoderConfig, GemmaConfig, TransformerConfig
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import BOS, END_OF_TURN

from .weights import randomise

GEMMA_2_2B = GemmaConfig()


class WordTokenizer:
    """Stands for Gemma's tokenizer, whose file cannot be had without its licence: one token for each word and mark."""

    def encode(self, text: str) -> list[int]:
        return [BOS, *(3 + hash_word(word) % 250_000 for word in text.split())]

    def find(self, piece: str) -> int | None:
        return 107 if piece == END_OF_TURN else None


class PaddingTokenizer(WordTokenizer):
    """The same as diffusers calls it: batches of equal length."""

    def __call__(self, prompts: list[str], *, max_length: int, **options: object) -> SimpleNamespace:
        ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            row = torch.tensor(self.encode(prompt)[:max_length])
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def hash_word(word: str) -> int:
    """The same number in every process."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(word[:8]))


def transformer_pair(
    config: TransformerConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Our transformer and diffusers'."""
    theirs = filled(lambda: diffusers_transformer(config), dtype, device)
    ours = SanaTransformer(config, device="meta")
    ours.load_state_dict(as_linear(theirs.state_dict()), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def autoencoder_pair(
    config: AutoencoderConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[DCAutoencoder, AutoencoderDC]:
    """Our autoencoder and diffusers'."""
    theirs = filled(lambda: diffusers_autoencoder(config), dtype, device)
    ours = DCAutoencoder(config, device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def gemma_pair(dtype: torch.dtype, device: str) -> tuple[GemmaTextEncoder, nn.Module]:
    """Our text encoder and transformers' network, with eager attention, its only implementation with soft-capping."""
    theirs = Gemma2Model._from_config(Gemma2Config(**gemma_json(GEMMA_2_2B)), attn_implementation="eager", dtype=dtype)
    randomise(theirs.to(device))
    for name, tensor in theirs.named_parameters():
        if "norm" in name:
            tensor.sub_(1.0)  # Gemma adds one
    ours = Gemma2(GEMMA_2_2B, device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return GemmaTextEncoder(ours.eval().requires_grad_(False), WordTokenizer()), theirs


def writer(model: nn.Module) -> nn.Module:
    """transformers' network that writes, around a Gemma that has the weights. No token ends a text."""
    with init_empty_weights():
        whole = Gemma2ForCausalLM._from_config(model.config, attn_implementation="eager")
    whole.model, whole.lm_head.weight = model, model.embed_tokens.weight
    whole.generation_config.eos_token_id = None
    return whole.eval().requires_grad_(False)


def filled(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A random network of diffusers, made without its own weights, which take long to draw and are float32 at first."""
    with init_empty_weights():
        network = make()
    buffers = dict(network.named_buffers())
    network = network.to(dtype).to_empty(device=device)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    return randomise(network)


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
        mlp_ratio=config.ff_width / config.hidden_size,
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
