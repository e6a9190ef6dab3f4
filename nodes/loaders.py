"""Loaders: checkpoint files to MODEL, CLIP and VAE."""

import torch
from comfy_api.latest import io

from ..sana.config import DEFAULT_GUIDANCE_SCALE, VARIANTS
from .host.checkpoint import load_model
from .host.clip import load_clip
from .host.preview import fitted_preview, show_previews
from .host.report import reported
from .host.vae import load_vae
from .model_files import AUTO, AUTOENCODER, TEXT_ENCODER, load_part, model_names, model_path, part_names, part_path

CATEGORY = "SANA/loaders"
DTYPES = {
    AUTO: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
PART_DTYPES = (AUTO, "bf16", "fp32")  # Gemma and the DC-AE overflow in fp16


class SanaCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaCheckpointLoader",
            display_name="Load SANA",
            category=CATEGORY,
            search_aliases=["checkpoint loader", "load model", "load diffusion model", "unet loader", "nvidia sana"],
            description="Loads a SANA model with its text encoder and its autoencoder. What the model is, is read from the file.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    tooltip="A file in models/diffusion_models or models/checkpoints, or a diffusers folder in models/diffusers. "
                    '"demo" is the toy-sized model that comes with this pack.',
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[AUTO, *part_names("text_encoders")],
                    default=AUTO,
                    tooltip="Gemma-2-2b-it in models/text_encoders. auto: from the model's file or folder, else the first one that fits.",
                ),
                io.Combo.Input(
                    "vae",
                    options=[AUTO, *part_names("vae")],
                    default=AUTO,
                    tooltip="DC-AE f32c32 in models/vae. auto: from the model's file or folder, else the first one that fits.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=AUTO,
                    tooltip="Number format of the model's weights. auto: the one it was released in. fp8 halves the memory.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *VARIANTS],
                    default=AUTO,
                    optional=True,
                    tooltip="For files that cannot tell a 2K or 4K model from a 1K one. auto: as the file says, else 1K.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model: str, text_encoder: str, vae: str, dtype: str, variant: str = AUTO) -> io.NodeOutput:
        path = model_path(model)
        patcher = load_model(path, None if variant == AUTO else variant, DTYPES[dtype])
        identity = patcher.model.identity
        encoder_path, clip = load_part(
            TEXT_ENCODER, path, text_encoder, lambda found: load_clip(found, transformer=identity.config)
        )
        autoencoder_path, autoencoder = load_part(
            AUTOENCODER, path, vae, lambda found: load_vae(found, transformer=identity.config)
        )
        show_previews(patcher, fitted_preview(autoencoder))
        parts = (("text encoder", encoder_path), ("autoencoder", autoencoder_path))
        origins = [f"its own {part}" if found == path else f"{part} {found.name}" for part, found in parts]
        usual = identity.guidance_scale == DEFAULT_GUIDANCE_SCALE
        made_for = f"{identity.base_size} px" + ("" if usual else f" and cfg {identity.guidance_scale:g}")
        text = f"{identity.variant}, made for {made_for}; {' and '.join(origins)}"
        return reported(patcher, clip, autoencoder, text=text)


class SanaTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaTextEncoderLoader",
            display_name="Load SANA text encoder",
            category=CATEGORY,
            search_aliases=["clip loader", "load clip", "gemma", "gemma 2", "text encoder loader"],
            description="Loads Gemma-2-2b-it with its tokenizer, from one file or a Hugging Face folder.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=part_names("text_encoders"),
                    tooltip="A file or folder in models/text_encoders.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(PART_DTYPES),
                    default=AUTO,
                    tooltip="Number format of the weights. auto: as in the file.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, text_encoder: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_clip(part_path("text_encoders", text_encoder), DTYPES[dtype]))


class DCAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCAELoader",
            display_name="Load DC-AE",
            category=CATEGORY,
            search_aliases=["vae loader", "load vae", "dc-ae", "deep compression autoencoder"],
            description="Loads the deep-compression autoencoder of SANA (1.0, 1.1 or Lite) as a VAE.",
            inputs=[
                io.Combo.Input("vae", options=part_names("vae"), tooltip="A file or folder in models/vae."),
                io.Combo.Input(
                    "dtype",
                    options=list(PART_DTYPES),
                    default=AUTO,
                    tooltip="Number format of weights and activations. auto: bf16 where the device computes with it, else fp32.",
                ),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(part_path("vae", vae), DTYPES[dtype]))


NODES = (SanaCheckpointLoader, SanaTextEncoderLoader, DCAELoader)
