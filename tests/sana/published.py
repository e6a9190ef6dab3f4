"""Numbers that are not ours to choose, and who publishes each: NVlabs, Google, MIT, or a paper.

Copied from the sources by hand and never computed from `sana`, so that a slip in a table there does not pass its tests.
Paths without a repository are those of NVlabs/Sana.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Transformer(NamedTuple):
    """A row of asset/docs/model_zoo.md, with its class in diffusion/model/nets and its yaml in configs/."""

    hidden_size: int
    depth: int
    cross_heads: int
    ff_width: int  # int(2.5 * hidden_size)
    qk_norm: bool
    sprint: bool  # guidance embedding and a timestep within [0, 1]: SanaMSCM, timestep_norm_scale_factor 1000
    position: tuple[int | None, float]  # base size in latent rows, and pe_interpolation; base None: use_pe False
    control_blocks: int  # copy_blocks_num
    base_size: int  # pixels
    flow_shift: float | None  # scheduler.flow_shift of the yaml
    dtype: str  # "released precision" of the model zoo
    source: str  # repository


# The models: sana_multi_scale.py, SanaMS_600M_P1_D28, SanaMS_1600M_P1_D20, SanaMS_4800M_P1_D60, and the two SanaMSCM.
_600M, _1600M, _4800M = (1152, 28, 16, 2880), (2240, 20, 20, 5600), (2240, 60, 20, 5600)
# What sets them apart. configs/sana_config/2048ms and 4096ms: use_pe True, and pe_interpolation 1.0 and 2.0; the base size
# is image_size / 32.
_PLAIN, _2K, _4K = (False, False, (None, 1.0), 0), (False, False, (64, 1.0), 0), (False, False, (128, 2.0), 0)
_V1_5, _SPRINT, _CONTROL = (True, False, (None, 1.0), 0), (True, True, (None, 1.0), 0), (False, False, (None, 1.0), 7)
# Flow shifts: configs/sana_config/512ms, 1024ms, 2048ms, 4096ms, configs/sana1-5_config and configs/sana_controlnet_config.
# Sana_600M_img1024.yaml says 4.0, Sana_1600M_img4096.yaml 6.0, and all others 3.0; Sprint has no flow schedule.
TRANSFORMERS = {
    name: Transformer(*size, *traits, base_size, flow_shift, dtype, f"Efficient-Large-Model/{repository}")
    for name, size, traits, base_size, flow_shift, dtype, repository in (
        ("sana-0.6b-1024px", _600M, _PLAIN, 1024, 4.0, "float16", "Sana_600M_1024px"),
        ("sana-0.6b-512px", _600M, _PLAIN, 512, 3.0, "float16", "Sana_600M_512px"),
        ("sana-1.6b-1024px", _1600M, _PLAIN, 1024, 3.0, "bfloat16", "Sana_1600M_1024px_BF16"),
        ("sana-1.6b-1024px-fp16", _1600M, _PLAIN, 1024, 3.0, "float16", "Sana_1600M_1024px_MultiLing"),
        ("sana-1.6b-512px", _1600M, _PLAIN, 512, 3.0, "float16", "Sana_1600M_512px_MultiLing"),
        ("sana-1.6b-2048px", _1600M, _2K, 2048, 3.0, "bfloat16", "Sana_1600M_2Kpx_BF16"),
        ("sana-1.6b-4096px", _1600M, _4K, 4096, 6.0, "bfloat16", "Sana_1600M_4Kpx_BF16"),
        ("sana-1.5-1.6b-1024px", _1600M, _V1_5, 1024, 3.0, "bfloat16", "SANA1.5_1.6B_1024px"),
        ("sana-1.5-4.8b-1024px", _4800M, _V1_5, 1024, 3.0, "bfloat16", "SANA1.5_4.8B_1024px"),
        ("sana-sprint-0.6b-1024px", _600M, _SPRINT, 1024, None, "bfloat16", "Sana_Sprint_0.6B_1024px"),
        ("sana-sprint-1.6b-1024px", _1600M, _SPRINT, 1024, None, "bfloat16", "Sana_Sprint_1.6B_1024px"),
        ("sana-0.6b-1024px-controlnet-hed", _600M, _CONTROL, 1024, 4.0, "float16", "Sana_600M_1024px_ControlNet_HED"),
        (
            "sana-1.6b-1024px-controlnet-hed",
            *(_1600M, _CONTROL, 1024, 3.0, "bfloat16", "Sana_1600M_1024px_BF16_ControlNet_HED"),
        ),
    )
}
# pag_applied_layers: [14] in configs/sana_app_config/Sana_600M_app.yaml, [8] in the yaml of every 1.6B model; the 4.8B has
# the default of diffusion/utils/config.py, which is [8].
PERTURBED_BLOCKS = {28: 14, 20: 8, 60: 8}  # by depth
TEXT_WIDTH = 2304  # caption_channels of every yaml
TEXT_TOKENS = 300  # text_encoder.model_max_length of every yaml
CHANNELS = 32  # vae.vae_latent_dim of every yaml; linear_head_dim is 32, too
CLAMP = 65504.0  # sana_blocks.py, LiteLA, before commit 92c7459: out.clip(-65504, 65504) after the projection
# eps of norms: sana_blocks.py and sana_multi_scale.py; of the autoencoder: mit-han-lab/efficientvit models/nn/norm.py
NORMS = {"self-attention": 1e-5, "cross-attention": 1e-6, "text": 1e-5, "layer": 1e-6, "autoencoder": 1e-5}


class Autoencoder(NamedTuple):
    """A function of mit-han-lab/efficientvit efficientvit/models/efficientvit/dc_ae.py, or one of dc-ai-projects/DC-Gen."""

    widths: tuple[int, ...]  # width_list, from full resolution to the latent grid
    encoder: tuple[int, ...]  # depth_list
    decoder: tuple[int, ...]
    attention: tuple[int, int]  # stages of EfficientViT blocks at the deep end, of the encoder and of the decoder
    scales: tuple[int, ...]  # kernels of their multi-scale branch: "EViTS5_GLU" has 5, "EViT_GLU" none
    batch_norm: int  # stages at the shallow end of the decoder with batch norm and ReLU
    latent_channels: int
    strided_down: bool  # downsample_block_type "Conv", otherwise "ConvPixelUnshuffle"
    nearest_up: bool  # upsample_block_type "InterpolateConv", otherwise "ConvPixelShuffle"
    shortcuts: bool  # of project_out of the encoder and project_in of the decoder
    out_activation: str
    latent_scale: float  # scaling_factor: diffusers scripts/convert_dcae_to_diffusers.py; 1.0: not published


_F32 = (128, 256, 512, 512, 1024, 1024)
_F64, _F128 = (*_F32, 2048), (*_F32, 2048, 2048)
_SANA = Autoencoder(_F32, (2, 2, 2, 3, 3, 3), (3,) * 6, (3, 3), (5,), 0, 32, True, True, True, "relu", 0.41407)
_LITE = Autoencoder(
    _F32, (2, 2, 2, 3, 3, 3), (0, 3, 5, 4, 4, 4), (3, 0), (5,), 0, 32, True, False, True, "silu", 0.41407
)
_F32_1_5, _F64_1_5 = (
    Autoencoder(widths, (0, 5, 10, *deep), (0, 5, 10, *deep), (0, 0), (), 0, 128, False, False, False, "silu", 1.0)
    for widths, deep in ((_F32, (4, 4, 4)), ((*_F32, 1024), (4, 4, 4, 4)))
)


def _imagenet(widths: tuple[int, ...], latent_channels: int, latent_scale: float) -> Autoencoder:
    deep = (2,) * (len(widths) - 3)
    encoder, decoder, attention = (0, 4, 8, *deep), (0, 5, 10, *deep), (len(deep),) * 2
    rest = (latent_channels, False, False, True, "relu", latent_scale)
    return Autoencoder(widths, encoder, decoder, attention, (), 3, *rest)


AUTOENCODERS = {
    "dc-ae-f32c32-sana-1.1": _SANA,
    "dc-ae-f32c32-sana-1.0": _SANA,
    "dc-ae-lite-f32c32-sana-1.1": _LITE,
    "dc-ae-f32c32-in-1.0": _imagenet(_F32, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _imagenet(_F32, 32, 0.4552),
    "dc-ae-f64c128-in-1.0": _imagenet(_F64, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": _imagenet(_F64, 128, 0.4538),
    "dc-ae-f128c512-in-1.0": _imagenet(_F128, 512, 0.4883),
    "dc-ae-f128c512-mix-1.0": _imagenet(_F128, 512, 0.3620),
    "dc-ae-f32c128-1.5": _F32_1_5,
    "dc-ae-f64c128-1.5": _F64_1_5,
}

# google/gemma-2-2b-it, config.json; the defaults of transformers models/gemma2/configuration_gemma2.py are the same.
GEMMA_2_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
GEMMA_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # the same file

# configs/sana_config/1024ms/Sana_1600M_img1024.yaml, chi_prompt: its eight lines joined by line feeds.
INSTRUCTION_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"

GUIDANCE_SCALE = 4.5  # app/sana_pipeline.py and app/sana_sprint_pipeline.py
STEPS = 20  # app/sana_pipeline.py, num_inference_steps
SPRINT_STEPS = 2  # app/sana_sprint_pipeline.py
FLOW_SHIFT = 3.0  # of most releases, and what diffusers' converter writes (scripts/convert_sana_to_diffusers.py)
GUIDANCE_EMBED_SCALE = 0.1  # sana_multi_scale.py, SanaMSCM, cfg_embed_scale
FLOW_DPM_START = 0.999  # diffusion/model/dpm_solver.py, time_uniform_flow: betas run from 1 to 0.001
SPRINT_ANGLES = {
    1: (1.57080, 0.0),
    2: (1.57080, 1.3, 0.0),
}  # app/sana_sprint_pipeline.py, max_ and intermediate_timesteps
# arXiv 2503.09641, table 7. 1.56830 is arctan(200 / 0.5).
PAPER_ANGLES = {1: (1.57080, 0.0), 2: (1.56830, 1.3, 0.0), 4: (1.56830, 1.3, 1.1, 0.6, 0.0)}
SCM_DEVIATION = 0.5  # sigma_d: app/sana_sprint_pipeline.py and arXiv 2503.09641, section 3


@cache
def aspect_ratios(base_size: int) -> frozenset[tuple[int, int]]:
    """The sizes (height, width), px, that models of a base size were trained on."""
    table = json.loads((Path(__file__).parents[1] / "data" / "aspect_ratios.json").read_text(encoding="utf-8"))
    return frozenset(tuple(int(side) for side in size.split("x")) for size in table[str(base_size)].split())
