"""What a SANA network is made of: one frozen dataclass per network, one table row per released checkpoint.

Nothing here reads files: `checkpoints/` finds the row, or fills a dataclass, from tensors and their companions.
"""

from dataclasses import dataclass, replace

LATENT_CHANNELS = 32
DOWNSAMPLE = 32  # pixels per latent cell along each axis, for the autoencoder of every released SANA
LATENT_SCALE = 0.41407  # latent = LATENT_SCALE * ae_latent, which brings its standard deviation near one
HEAD_WIDTH = 32  # channels of a linear attention head, in the transformer and in the autoencoder
TEXT_TOKENS = 300  # rows of `text`, the beginning-of-sequence token included


@dataclass(frozen=True)
class TransformerConfig:
    """One linear diffusion transformer (SANA, arXiv 2410.10629 section 3.2; SANA-1.5, 2501.18427; Sprint, 2503.09641)."""

    hidden_size: int = 2240
    depth: int = 20
    cross_heads: int = 20
    text_width: int = 2304  # channels of the text encoder's last hidden state
    channels: int = LATENT_CHANNELS
    ff_width: int = 5600  # inner width of the Mix-FFN
    qk_norm: bool = False  # RMSNorm of queries and keys in both attentions: SANA-1.5 and Sprint
    guidance_embed: bool = False  # the guidance scale is embedded and added to the time embedding: Sprint
    continuous_time: bool = False  # the timestep is sigma in [0, 1]; otherwise floor(1000 * sigma)
    position_base: int | None = None  # latent rows of the grid the position table spans; None: no table
    position_interpolation: float = 1.0  # divides the coordinates of the position table
    control_blocks: int = 0  # copied blocks of a ControlNet checkpoint

    @property
    def self_heads(self) -> int:
        return self.hidden_size // HEAD_WIDTH

    @property
    def perturbed_block(self) -> int:
        """The block that perturbed-attention guidance changes (NVlabs/Sana configs: 14 of the 0.6B's 28 blocks, else 8)."""
        return min(14 if self.depth == 28 else 8, self.depth - 1)


@dataclass(frozen=True)
class Variant:
    """A released transformer, and what its tensors cannot tell."""

    transformer: TransformerConfig
    base_size: int  # pixels: side of the squares it was last trained on
    flow_shift: float | None  # None: Sprint samples angles, not a flow schedule
    dtype: str  # precision of the release
    source: str  # Hugging Face repository


_600M = TransformerConfig(hidden_size=1152, depth=28, cross_heads=16, ff_width=2880)
_1600M = TransformerConfig()
_2K = replace(_1600M, position_base=64)
_4K = replace(_1600M, position_base=128, position_interpolation=2.0)
_V15_1600M = replace(_1600M, qk_norm=True)
_V15_4800M = replace(_V15_1600M, depth=60)
_SPRINT_600M = replace(_600M, qk_norm=True, guidance_embed=True, continuous_time=True)
_SPRINT_1600M = replace(_1600M, qk_norm=True, guidance_embed=True, continuous_time=True)
_ELM = "Efficient-Large-Model/"

# Order matters: of several rows with the same network, detection takes the first one with the right base size.
# Flow shifts are those of NVlabs/Sana configs/sana_config/*/*.yaml. The 0.6B at 1024 px was trained and is sampled with
# 4.0 there (configs/sana_config/1024ms/Sana_600M_img1024.yaml), although its converted diffusers folder says 3.0.
VARIANTS: dict[str, Variant] = {
    "sana-0.6b-1024px": Variant(_600M, 1024, 4.0, "float16", _ELM + "Sana_600M_1024px"),
    "sana-0.6b-512px": Variant(_600M, 512, 3.0, "float16", _ELM + "Sana_600M_512px"),
    "sana-1.6b-1024px": Variant(_1600M, 1024, 3.0, "bfloat16", _ELM + "Sana_1600M_1024px_BF16"),
    "sana-1.6b-1024px-fp16": Variant(_1600M, 1024, 3.0, "float16", _ELM + "Sana_1600M_1024px_MultiLing"),
    "sana-1.6b-512px": Variant(_1600M, 512, 3.0, "float16", _ELM + "Sana_1600M_512px_MultiLing"),
    "sana-1.6b-2048px": Variant(_2K, 2048, 3.0, "bfloat16", _ELM + "Sana_1600M_2Kpx_BF16"),
    "sana-1.6b-4096px": Variant(_4K, 4096, 6.0, "bfloat16", _ELM + "Sana_1600M_4Kpx_BF16"),
    "sana-1.5-1.6b-1024px": Variant(_V15_1600M, 1024, 3.0, "bfloat16", _ELM + "SANA1.5_1.6B_1024px"),
    "sana-1.5-4.8b-1024px": Variant(_V15_4800M, 1024, 3.0, "bfloat16", _ELM + "SANA1.5_4.8B_1024px"),
    "sana-sprint-0.6b-1024px": Variant(_SPRINT_600M, 1024, None, "bfloat16", _ELM + "Sana_Sprint_0.6B_1024px"),
    "sana-sprint-1.6b-1024px": Variant(_SPRINT_1600M, 1024, None, "bfloat16", _ELM + "Sana_Sprint_1.6B_1024px"),
    "sana-0.6b-1024px-controlnet-hed": Variant(
        replace(_600M, control_blocks=7), 1024, 4.0, "float16", _ELM + "Sana_600M_1024px_ControlNet_HED"
    ),
    "sana-1.6b-1024px-controlnet-hed": Variant(
        replace(_1600M, control_blocks=7), 1024, 3.0, "bfloat16", _ELM + "Sana_1600M_1024px_BF16_ControlNet_HED"
    ),
}


TRANSFORMER_SOURCE = VARIANTS["sana-1.6b-1024px"].source  # for who has none
AUTOENCODER_SOURCE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
TEXT_ENCODER_SOURCE = _ELM + "gemma-2-2b-it"
DEFAULT_FLOW_SHIFT = 3.0  # of a network that is no row of VARIANTS
DEFAULT_GUIDANCE_SCALE = 4.5  # of the official demo, for every release


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


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma-2 (arXiv 2408.00118); the defaults are Gemma-2-2b. Fields are named as in a Hugging Face `config.json`."""

    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256  # attention logits are divided by its square root
    attn_logit_softcapping: float = 50.0
    final_logit_softcapping: float = 30.0
    sliding_window: int = 4096  # tokens that every other layer looks back
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class StageConfig:
    """One resolution of an encoder or a decoder."""

    width: int
    depth: int  # blocks
    attention: bool = False  # EfficientViT blocks; otherwise residual blocks of two 3x3 convolutions
    scales: tuple[int, ...] = ()  # kernel sizes of the multi-scale branches of the attention
    batch_norm: bool = False  # otherwise RMSNorm over channels
    activation: str = "silu"  # of residual blocks: "silu" or "relu"


@dataclass(frozen=True)
class AutoencoderConfig:
    """One deep-compression autoencoder (DC-AE, arXiv 2410.10733). Stages run from full resolution to the latent grid."""

    encoder: tuple[StageConfig, ...]
    decoder: tuple[StageConfig, ...]
    latent_channels: int = LATENT_CHANNELS
    strided_down: bool = True  # stride-2 convolution; otherwise convolution and pixel-unshuffle
    nearest_up: bool = True  # nearest-neighbour and convolution; otherwise convolution and pixel-shuffle
    shortcuts: bool = True  # around the encoder's last and the decoder's first convolution
    out_activation: str = "relu"  # before the decoder's last convolution: "relu" or "silu"
    latent_scale: float = LATENT_SCALE

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.encoder) - 1)


_WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)


def _stages(depths: tuple[int, ...], attention_from: int, scales: tuple[int, ...] = ()) -> tuple[StageConfig, ...]:
    """Stages of the usual widths; those from index `attention_from` on hold EfficientViT blocks."""
    return tuple(
        StageConfig(width, depth, i >= attention_from, scales if i >= attention_from else ())
        for i, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=False))
    )


def _imagenet(levels: int, latent_channels: int, latent_scale: float) -> AutoencoderConfig:
    """The first DC-AE family ("in" and "mix"): batch norm and ReLU in the decoder's three shallow stages."""
    deep = (2,) * (levels - 3)
    decoder = _stages((0, 5, 10) + deep, 3)
    shallow = tuple(replace(stage, batch_norm=True, activation="relu") for stage in decoder[:3])
    return AutoencoderConfig(
        encoder=_stages((0, 4, 8) + deep, 3),
        decoder=shallow + decoder[3:],
        latent_channels=latent_channels,
        strided_down=False,
        nearest_up=False,
        latent_scale=latent_scale,
    )


def _version_1_5(levels: int) -> AutoencoderConfig:
    """DC-AE 1.5 (DC-Gen): residual blocks only, no outer shortcuts. Its latent scale is not published."""
    stages = _stages((0, 5, 10) + (4,) * (levels - 3), levels)
    stages = tuple(replace(stage, width=min(stage.width, 1024)) for stage in stages)
    return AutoencoderConfig(
        encoder=stages,
        decoder=stages,
        latent_channels=128,
        strided_down=False,
        nearest_up=False,
        shortcuts=False,
        out_activation="silu",
        latent_scale=1.0,
    )


_SANA_ENCODER = _stages((2, 2, 2, 3, 3, 3), 3, (5,))
_SANA_AE = AutoencoderConfig(_SANA_ENCODER, _stages((3, 3, 3, 3, 3, 3), 3, (5,)))
_LITE_AE = AutoencoderConfig(_SANA_ENCODER, _stages((0, 3, 5, 4, 4, 4), 6), nearest_up=False, out_activation="silu")

# Names and latent scales: mit-han-lab/efficientvit efficientvit/ae_model_zoo.py and diffusers
# scripts/convert_dcae_to_diffusers.py. sana-1.0 and -1.1 share the encoder, so their latents are interchangeable.
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "dc-ae-f32c32-sana-1.1": _SANA_AE,
    "dc-ae-f32c32-sana-1.0": _SANA_AE,
    "dc-ae-lite-f32c32-sana-1.1": _LITE_AE,
    "dc-ae-f32c32-in-1.0": _imagenet(6, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _imagenet(6, 32, 0.4552),
    "dc-ae-f64c128-in-1.0": _imagenet(7, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": _imagenet(7, 128, 0.4538),
    "dc-ae-f128c512-in-1.0": _imagenet(8, 512, 0.4883),
    "dc-ae-f128c512-mix-1.0": _imagenet(8, 512, 0.3620),
    "dc-ae-f32c128-1.5": _version_1_5(6),
    "dc-ae-f64c128-1.5": _version_1_5(7),
}
