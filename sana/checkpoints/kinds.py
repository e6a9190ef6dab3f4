"""What a file is that is not what was asked for, in words for an error message. By the names of its tensors alone."""

from collections.abc import Mapping

from .formats import SVDQUANT as SVDQUANT_FORMAT
from .names import (
    EARLY_DIFFUSERS_MARK,
    QUANTO_MARK,
    TRANSFORMER_MARKS,
    UNMERGED_MARK,
    VIDEO_MARKS,
    is_controlnet,
    is_transformer,
)

QUANTO = "a model quantised by quanto"
UNMERGED = "a SANA transformer with an adapter of PEFT that is not merged"
ADAPTER = "an adapter of the kind OFT, BOFT or GLoRA, which ComfyUI reads and the shell does not"
SVDQUANT = "a SANA transformer quantised by SVDQuant, which only nunchaku reads"
# What other files users hand us by mistake, by a part of a tensor name.
KINDS = (
    (VIDEO_MARKS, "SANA-Video, which makes videos and runs in diffusers"),
    ((UNMERGED_MARK,), UNMERGED),
    ((QUANTO_MARK,), QUANTO),
    (("lora_A.", "lora_B.", "lora_down.", "lora_up.", "hada_w1", "lokr_w1"), "a LoRA"),
    ((".oft_blocks", ".a1.weight"), ADAPTER),
    (SVDQUANT_FORMAT.marks, SVDQUANT),
    (("double_blocks.0.", "single_transformer_blocks.0."), "a Flux model"),
    (("input_blocks.0.0.", "down_blocks.0.resnets.0.time_emb_proj."), "a Stable Diffusion model"),
    (("joint_blocks.0.",), "a Stable Diffusion 3 model"),
    (("controlnet_blocks.0.",), "a ControlNet for another model"),
    (("lyric_embs.", "vocoder.backbone."), "a part of ACE-Step, which makes music"),
    (("decoder.up_blocks.0.resnets.", "decoder.up.0.block.", "first_stage_model."), "the VAE of another model"),
    (("encoder.down_blocks.1.0.conv1.", "encoder.stages.1.op_list."), "a DC-AE, the autoencoder of SANA"),
    ((*TRANSFORMER_MARKS, EARLY_DIFFUSERS_MARK), "a SANA transformer"),
    (("layers.0.post_feedforward_layernorm.",), "a Gemma text encoder"),
    (("text_model.encoder.layers.0.", "encoder.block.0.layer.0."), "the text encoder of another model"),
    (
        ("adaln_single.", "y_embedder.", "blocks.0.attn.qkv."),
        "a diffusion transformer of another family, such as PixArt",
    ),
)


def describe(names: Mapping[str, object]) -> str:
    """What a file with tensors of these names seems to be, for an error message."""
    if is_controlnet(names) and not is_transformer(names):
        return "a ControlNet for SANA"
    for marks, kind in KINDS:
        if any(mark in name for mark in marks for name in names):
            return kind
    return f"a file of unknown kind (its first tensor is {next(iter(names))})" if names else "empty"
