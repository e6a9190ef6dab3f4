"""Checkpoints in the names they are published in, made from diffusers' names. Reading them is what `sana.checkpoints.names` does.

Sources: the modules of NVlabs/Sana diffusion/model/nets and mit-han-lab/efficientvit, as listed in tests/data.
"""

import re

import torch
from torch import Tensor

from sana.config import AutoencoderConfig

Tensors = dict[str, Tensor]

# Parts of diffusers' names and of the official ones, applied in this order.
OFFICIAL = (
    ("patch_embed.", "x_embedder."),
    ("time_embed.guidance_embedder.linear_1", "cfg_embedder.mlp.0"),
    ("time_embed.guidance_embedder.linear_2", "cfg_embedder.mlp.2"),
    ("time_embed.emb.", "time_embed."),
    ("time_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.linear", "t_block.1"),
    ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("caption_norm", "attention_y_norm"),
    ("proj_out", "final_layer.linear"),
    ("transformer_blocks.", "blocks."),
    ("attn1.norm_q", "attn.q_norm"),
    ("attn1.norm_k", "attn.k_norm"),
    ("attn1.to_out.0", "attn.proj"),
    ("attn2.norm_q", "cross_attn.q_norm"),
    ("attn2.norm_k", "cross_attn.k_norm"),
    ("attn2.to_out.0", "cross_attn.proj"),
    ("attn2.to_q", "cross_attn.q_linear"),
    ("ff.conv_inverted", "mlp.inverted_conv.conv"),
    ("ff.conv_depth", "mlp.depth_conv.conv"),
    ("ff.conv_point", "mlp.point_conv.conv"),
)
# The first of several tensors that one official tensor holds, the others, and its name.
FUSED = (
    ("attn1.to_q", ("attn1.to_k", "attn1.to_v"), "attn.qkv"),
    ("attn2.to_k", ("attn2.to_v",), "cross_attn.kv_linear"),
)
EARLY_DIFFUSERS = (
    ("patch_embed.", "pos_embed."),
    ("time_embed.", "adaln_single."),
    (".ff.conv_inverted.", ".ff.inverted_conv.conv."),
    (".ff.conv_depth.", ".ff.depth_conv.conv."),
    (".ff.conv_point.", ".ff.point_conv.conv."),
)
ORIGINAL = (
    (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"^decoder\.conv_in\.", "decoder.project_in.main.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"^decoder\.conv_out\.", "decoder.project_out.op_list.2.conv."),
    (r"(down|up)_blocks\.(\d+)\.(\d+)\.", r"stages.\2.op_list.\3."),
    (r"(op_list\.\d+)\.attn\.", r"\1.context_module.main."),
    (r"(op_list\.\d+)\.conv_out\.norm\.", r"\1.local_module.main.point_conv.norm."),
    (r"(op_list\.\d+)\.conv_out\.conv_(\w+)\.", r"\1.local_module.main.\2_conv.conv."),
    (r"(op_list\.\d+)\.conv(\d)\.", r"\1.main.conv\2.conv."),
    (r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
    (r"to_qkv_multiscale\.0\.proj_in", "aggreg.0.0"),
    (r"to_qkv_multiscale\.0\.proj_out", "aggreg.0.1"),
    (r"main\.norm_out\.", "main.proj.norm."),
)


def official_transformer(tensors: Tensors, positions: int = 1024) -> Tensors:
    """A transformer as NVlabs publishes it, with its buffers; positions: length of the position buffer."""
    width, text_width = tensors["caption_projection.linear_1.weight"].shape
    found = _official_names(tensors)
    found["pos_embed"] = torch.zeros(1, positions, width)
    found["y_embedder.y_embedding"] = torch.randn(300, text_width)
    if "cfg_embedder.mlp.0.weight" in found:
        found["logvar_linear.weight"], found["logvar_linear.bias"] = torch.zeros(1, width), torch.zeros(1)
    return found


def padded(tensors: Tensors, inner: int) -> Tensors:
    """A transformer in diffusers' names whose Mix-FFN has zeros up to a width, each half of it by itself.

    NVlabs/Sana tools/convert_scripts/convert_sana_to_svdquant.py, handle_mismatched_shapes.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".ff.conv_point." in name:
            zeros = tensor.new_zeros(tensor.shape[0], inner - tensor.shape[1], 1, 1)
            found[name] = torch.cat([tensor, zeros], dim=1)
        elif ".ff." in name:
            halves = tensor.chunk(2)
            zeros = tensor.new_zeros(inner - len(halves[0]), *tensor.shape[1:])
            found[name] = torch.cat([halves[0], zeros, halves[1], zeros])
    return found


def official_controlnet(trunk: Tensors, control: Tensors) -> Tensors:
    """A transformer and its ControlNet in one file, as NVlabs publishes it: the embeddings are there once."""
    found = official_transformer(trunk)
    for name, tensor in _official_names(control).items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block:
            found[f"controlnet.{block[1]}.copied_block.{block[2]}"] = tensor
        elif name.startswith("controlnet_blocks."):
            found[re.sub(r"controlnet_blocks\.(\d+)", r"controlnet.\1.after_proj", name)] = tensor
        elif name.startswith("input_block."):
            found[name.replace("input_block", "controlnet.0.before_proj")] = tensor
    return found


def early_diffusers_transformer(tensors: Tensors) -> Tensors:
    """A transformer in the names diffusers had before its SANA classes were merged."""
    return {_replaced(name, EARLY_DIFFUSERS): tensor for name, tensor in tensors.items()}


def original_autoencoder(tensors: Tensors, config: AutoencoderConfig) -> Tensors:
    """An autoencoder as mit-han-lab publishes it."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((".to_k.weight", ".to_v.weight")):
            continue
        if name.endswith(".to_q.weight"):
            parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, tensor = name.replace("to_q", "qkv.conv"), torch.cat(parts)[..., None, None]
        elif name.endswith(".to_out.weight"):
            name, tensor = name.replace("to_out", "proj.conv"), tensor[..., None, None]
        # A convolution that changes the resolution by its stride is bare, one before or after a rearrangement is wrapped.
        wrapped = "main.conv." if config.strided_down and "down_blocks" in name else "main.conv.conv."
        name = re.sub(r"((?:down|up)_blocks\.\d+\.\d+\.)conv\.(?=weight|bias)", rf"\1{wrapped}", name)
        for old, new in ORIGINAL:
            name = re.sub(old, new, name)
        # What has a shortcut around it is the module "main" of another.
        found[name if config.shortcuts else re.sub(r"(project_\w+\.)main\.", r"\1", name)] = tensor
    return found


def _official_names(tensors: Tensors) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        first = next((fused for fused in FUSED if fused[0] in name), None)
        if first:
            query, rest, fused = first
            parts = [tensor, *(tensors[name.replace(query, part)] for part in rest)]
            found[name.replace(query, fused).replace("transformer_blocks.", "blocks.")] = torch.cat(parts)
        elif name == "scale_shift_table":
            found["final_layer.scale_shift_table"] = tensor
        elif not any(part in name for _, rest, _ in FUSED for part in rest):
            found[_replaced(name, OFFICIAL)] = tensor
    return found


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name
