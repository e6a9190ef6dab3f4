"""The structure of every released network at a few channels, and the random twins that are made of it."""

from dataclasses import replace

from bench.twins import as_linear, autoencoder_pair, diffusers_autoencoder, diffusers_transformer, transformer_pair
from bench.weights import randomise
from sana.config import AUTOENCODERS, VARIANTS, AutoencoderConfig, StageConfig, TransformerConfig

__all__ = [
    "as_linear",
    "autoencoder_pair",
    "diffusers_autoencoder",
    "diffusers_transformer",
    "randomise",
    "tiny_autoencoder_config",
    "tiny_config",
    "transformer_pair",
]

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


def tiny_config(variant: str, depth: int = 3) -> TransformerConfig:
    """The structure of a variant at width 96: three heads of 32 in self-attention, two of 48 in cross-attention."""
    row = VARIANTS[variant].transformer
    return replace(row, hidden_size=96, depth=depth, cross_heads=2, text_width=TEXT_WIDTH, ff_width=240)


def tiny_autoencoder_config(name: str, depth: int = 2) -> AutoencoderConfig:
    """The structure of a family at a few channels and at most `depth` blocks a stage."""
    row, widths = AUTOENCODERS[name], FAMILIES[name]

    def shrink(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(s, width=w, depth=min(s.depth, depth)) for s, w in zip(stages, widths, strict=True))

    return replace(row, encoder=shrink(row.encoder), decoder=shrink(row.decoder), latent_channels=32)
