"""Tensor names: from every dialect SANA is published in to the diffusers names our modules have, as tables. No files here.

Sources: NVlabs/Sana tools/convert_scripts/convert_sana_to_diffusers.py for the transformer, diffusers
scripts/convert_dcae_to_diffusers.py for the autoencoder. In the tables `*` stands for the rest of a name, "weight" or "bias".
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from .formats import COMFY_ATTENTION, scales_of_parts

Tensors = dict[str, Tensor]

# Names whose presence tells the dialect. What stands before them in a file is a prefix of all names.
OFFICIAL_MARK = "blocks.0.mlp.inverted_conv.conv.weight"
OFFICIAL_LINEAR_MARK = "blocks.0.mlp.inverted_conv.linear.weight"  # where the 1x1 convolutions are Linear
DIFFUSERS_MARK = "transformer_blocks.0.ff.conv_inverted.weight"
EARLY_DIFFUSERS_MARK = "transformer_blocks.0.ff.inverted_conv.conv.weight"  # of late 2024, and of ACE-Step
EARLY_DIFFUSERS_EMBEDDING = "pos_embed.proj.weight"  # which ACE-Step lacks
TRANSFORMER_MARKS = (OFFICIAL_MARK, OFFICIAL_LINEAR_MARK, DIFFUSERS_MARK)  # each enough to tell one
CONTROL_MARK = "controlnet_blocks.0.weight"  # of diffusers' ControlNet, which has the marks of a transformer as well
OFFICIAL_CONTROL_MARK = "controlnet.0.copied_block.mlp.inverted_conv.conv.weight"  # beside the transformer's own
CONTROL_BLOCK = re.compile(r"(?:.+\.)?controlnet(?:_blocks)?\.(\d+)\.")  # what names in either dialect begin with
# Of SANA-Video, which has the marks of a transformer too.
VIDEO_MARKS = ("transformer_blocks.0.ff.conv_temp.weight", "blocks.0.mlp.t_conv.weight")
UNMERGED_MARK = ".base_layer."  # of a network that PEFT has put adapters into
QUANTO_MARK = ".weight._data"  # of layers that quanto has quantised
MUSIC_MARK = "vocoder.backbone.channel_layers.0.0.bias"  # of ACE-Step's autoencoder, which has those of a DC-AE too
AUTOENCODER_MARKS = ("encoder.down_blocks.1.0.conv1.weight", "encoder.stages.1.op_list.0.main.conv1.conv.weight")

# 1x1 convolutions of the transformer, which are matrices here.
POINTWISE = (".conv_inverted.weight", ".conv_point.weight", "patch_embed.proj.weight")

# Official name: ours. Several of ours: the official tensor is cut into equal parts along its first axis.
OUTSIDE = {
    "x_embedder.proj.*": "patch_embed.proj.*",
    "t_embedder.mlp.0.*": "time_embed.emb.timestep_embedder.linear_1.*",
    "t_embedder.mlp.2.*": "time_embed.emb.timestep_embedder.linear_2.*",
    "t_block.1.*": "time_embed.linear.*",
    "y_embedder.y_proj.fc1.*": "caption_projection.linear_1.*",
    "y_embedder.y_proj.fc2.*": "caption_projection.linear_2.*",
    "attention_y_norm.*": "caption_norm.*",
    "final_layer.linear.*": "proj_out.*",
    "final_layer.scale_shift_table": "scale_shift_table",
}
OUTSIDE_SPRINT = {
    **OUTSIDE,
    "t_embedder.mlp.0.*": "time_embed.timestep_embedder.linear_1.*",
    "t_embedder.mlp.2.*": "time_embed.timestep_embedder.linear_2.*",
    "cfg_embedder.mlp.0.*": "time_embed.guidance_embedder.linear_1.*",
    "cfg_embedder.mlp.2.*": "time_embed.guidance_embedder.linear_2.*",
}
IN_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "attn.qkv.*": ("attn1.to_q.*", "attn1.to_k.*", "attn1.to_v.*"),
    "attn.q_norm.*": "attn1.norm_q.*",
    "attn.k_norm.*": "attn1.norm_k.*",
    "attn.proj.*": "attn1.to_out.0.*",
    "cross_attn.q_linear.*": "attn2.to_q.*",
    "cross_attn.kv_linear.*": ("attn2.to_k.*", "attn2.to_v.*"),
    "cross_attn.q_norm.*": "attn2.norm_q.*",
    "cross_attn.k_norm.*": "attn2.norm_k.*",
    "cross_attn.proj.*": "attn2.to_out.0.*",
    "mlp.inverted_conv.conv.*": "ff.conv_inverted.*",
    "mlp.inverted_conv.linear.*": "ff.conv_inverted.*",
    "mlp.depth_conv.conv.*": "ff.conv_depth.*",
    "mlp.point_conv.conv.*": "ff.conv_point.*",
    "mlp.point_conv.linear.*": "ff.conv_point.*",
}
HEADER_TENSOR = "sana_header"  # bytes that `header.header_tensor` wrote
# Ends of names of scales that have a number for each row of a matrix, where they have several.
ROW_SCALES = ("weight_scale", "weight_s_channel")
# Buffers and training-only tensors of official files.
DROPPED = (HEADER_TENSOR, "pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")

EARLY_DIFFUSERS = {
    "pos_embed.proj.": "patch_embed.proj.",
    "adaln_single.": "time_embed.",
    ".ff.inverted_conv.conv.": ".ff.conv_inverted.",
    ".ff.depth_conv.conv.": ".ff.conv_depth.",
    ".ff.point_conv.conv.": ".ff.conv_point.",
}

# The same for the autoencoder. What has a shortcut around it is the "main" of another module there.
AUTOENCODER_OUTSIDE = {
    "encoder.project_in.conv.*": "encoder.conv_in.*",
    "encoder.project_in.conv.conv.*": "encoder.conv_in.conv.*",  # one that also halves the resolution
    "encoder.project_in.main.conv.conv.*": "encoder.conv_in.conv.*",
    "encoder.project_out.op_list.0.conv.*": "encoder.conv_out.*",
    "encoder.project_out.main.op_list.0.conv.*": "encoder.conv_out.*",
    "decoder.project_in.conv.*": "decoder.conv_in.*",
    "decoder.project_in.main.conv.*": "decoder.conv_in.*",
    "decoder.project_out.op_list.0.*": "decoder.norm_out.*",
    "decoder.project_out.op_list.2.conv.*": "decoder.conv_out.*",
    "decoder.project_out.op_list.2.conv.conv.*": "decoder.conv_out.conv.*",  # one that also doubles it
    "decoder.project_out.op_list.2.main.conv.conv.*": "decoder.conv_out.conv.*",
}
AUTOENCODER_BLOCK = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)")
AUTOENCODER_BLOCKS = {"encoder": "down_blocks", "decoder": "up_blocks"}
IN_AUTOENCODER_BLOCK = {
    "conv.*": "conv.*",
    "conv.conv.*": "conv.*",
    "main.conv.*": "conv.*",
    "main.conv.conv.*": "conv.*",
    "main.conv1.conv.*": "conv1.*",
    "main.conv2.conv.*": "conv2.*",
    "main.conv2.norm.*": "norm.*",
    "context_module.main.qkv.conv.*": ("attn.to_q.*", "attn.to_k.*", "attn.to_v.*"),
    "context_module.main.aggreg.0.0.*": "attn.to_qkv_multiscale.0.proj_in.*",
    "context_module.main.aggreg.0.1.*": "attn.to_qkv_multiscale.0.proj_out.*",
    "context_module.main.proj.conv.*": "attn.to_out.*",
    "context_module.main.proj.norm.*": "attn.norm_out.*",
    "local_module.main.inverted_conv.conv.*": "conv_out.conv_inverted.*",
    "local_module.main.depth_conv.conv.*": "conv_out.conv_depth.*",
    "local_module.main.point_conv.conv.*": "conv_out.conv_point.*",
    "local_module.main.point_conv.norm.*": "conv_out.norm.*",
}
# Matrices of the autoencoder that are 1x1 convolutions in original files.
AUTOENCODER_MATRICES = (".attn.to_q.weight", ".attn.to_k.weight", ".attn.to_v.weight", ".attn.to_out.weight")


def dialect_prefix(names: Mapping[str, object], mark: str) -> str | None:
    """What stands before `mark` in a file that has it; None: the file does not have it."""
    return next(_prefixes(names, mark), None)


def _prefixes(names: Mapping[str, object], mark: str) -> Iterator[str]:
    return (name.removesuffix(mark) for name in names if name == mark or name.endswith("." + mark))


def is_transformer(names: Mapping[str, object]) -> bool:
    if any(dialect_prefix(names, mark) is not None for mark in VIDEO_MARKS):
        return False
    if any(mark in name for name in names for mark in (UNMERGED_MARK, QUANTO_MARK)):
        return False
    early = dialect_prefix(names, EARLY_DIFFUSERS_MARK)
    return (early is not None and early + EARLY_DIFFUSERS_EMBEDDING in names) or any(
        _transformer_prefix(names, mark) is not None for mark in TRANSFORMER_MARKS
    )


def _transformer_prefix(names: Mapping[str, object], mark: str) -> str | None:
    """As `dialect_prefix`, but not that of diffusers' ControlNet."""
    return next((prefix for prefix in _prefixes(names, mark) if prefix + CONTROL_MARK not in names), None)


def is_controlnet(names: Mapping[str, object]) -> bool:
    """Whether a file holds a ControlNet for SANA, alone or beside its transformer."""
    return _control_prefix(names) is not None


def _control_prefix(names: Mapping[str, object]) -> str | None:
    official = dialect_prefix(names, OFFICIAL_CONTROL_MARK)
    # Other models have ControlNets with the second name.
    theirs = (prefix for prefix in _prefixes(names, CONTROL_MARK) if prefix + DIFFUSERS_MARK in names)
    return next(theirs, None) if official is None else official


def control_blocks(names: Mapping[str, object]) -> int:
    """How many blocks the ControlNet in a file has; 0: there is none."""
    return len({match[1] for name in names if (match := CONTROL_BLOCK.match(name))})


def is_autoencoder(names: Mapping[str, object]) -> bool:
    found = any(dialect_prefix(names, mark) is not None for mark in AUTOENCODER_MARKS)
    return found and dialect_prefix(names, MUSIC_MARK) is None


def to_transformer_names(tensors: Tensors) -> Tensors:
    """The transformer of a file in any dialect, in our names; a ControlNet's own part is left out."""
    for mark, rename in (
        (OFFICIAL_MARK, _from_official),
        (OFFICIAL_LINEAR_MARK, _from_official),
        (DIFFUSERS_MARK, dict),
        (EARLY_DIFFUSERS_MARK, _from_early_diffusers),
    ):
        prefix = _transformer_prefix(tensors, mark)
        if prefix is not None:
            found = rename(_below(tensors, prefix))
            return {name: _as_linear(name, tensor) for name, tensor in found.items() if not _is_dropped(name)}
    raise AssertionError("the caller has not asked is_transformer")


def _is_dropped(name: str) -> bool:
    return name in DROPPED or name.endswith(COMFY_ATTENTION)


def to_control_names(tensors: Tensors) -> Tensors:
    """The ControlNet of a file that `is_controlnet`, with its own copy of the embeddings, in our names."""
    found = {}
    for name, tensor in _below(tensors, _control_prefix(tensors)).items():
        match = re.match(r"controlnet\.(\d+)\.(before_proj|after_proj|copied_block)\.(.+)", name)
        if match is None:
            if not name.startswith(("blocks.", "final_layer.")) and name not in DROPPED:
                found.update(_apply(name, tensor, OUTSIDE))
            continue
        index, part, rest = match.groups()
        if part == "copied_block":
            found.update(_apply(rest, tensor, IN_BLOCK, f"transformer_blocks.{index}."))
        else:
            target = "input_block" if part == "before_proj" else f"controlnet_blocks.{index}"
            found[f"{target}.{rest}"] = tensor
    return {name: _as_linear(name, tensor) for name, tensor in found.items()}


def to_autoencoder_names(tensors: Tensors) -> Tensors:
    """The DC-AE of a file in original (mit-han-lab) or diffusers names, in our names."""
    mark = next(mark for mark in AUTOENCODER_MARKS if dialect_prefix(tensors, mark) is not None)
    tensors = _below(tensors, dialect_prefix(tensors, mark))
    if ".op_list." not in mark:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        block = AUTOENCODER_BLOCK.fullmatch(name)
        if block:
            prefix = f"{block[1]}.{AUTOENCODER_BLOCKS[block[1]]}.{block[2]}.{block[3]}."
            found.update(_apply(block[4], tensor, IN_AUTOENCODER_BLOCK, prefix))
        else:
            found.update(_apply(name, tensor, AUTOENCODER_OUTSIDE))
    return {name: _as_linear(name, tensor, AUTOENCODER_MATRICES) for name, tensor in found.items()}


def with_convolutions(tensors: Tensors) -> Tensors:
    """A transformer in our names, with the shapes diffusers gives its 1x1 convolutions."""
    return {
        name: tensor[..., None, None] if name.endswith(POINTWISE) and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _from_official(tensors: Tensors) -> Tensors:
    outside = OUTSIDE_SPRINT if any(name.startswith("cfg_embedder.") for name in tensors) else OUTSIDE
    found = {}
    for name, tensor in tensors.items():
        match = re.match(r"blocks\.(\d+)\.(.+)", name)
        if match:
            weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
            rows = weight.shape[0] if weight is not None and weight.ndim else 0
            found.update(_apply(match[2], tensor, IN_BLOCK, f"transformer_blocks.{match[1]}.", rows))
        elif not name.startswith("controlnet.") and name not in DROPPED:
            found.update(_apply(name, tensor, outside))
    return found


def _from_early_diffusers(tensors: Tensors) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for old, new in EARLY_DIFFUSERS.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def _apply(
    name: str, tensor: Tensor, table: Mapping[str, str | tuple[str, ...]], prefix: str = "", rows: int = 0
) -> Tensors:
    """One tensor in our names. A name that is not in the table keeps its own, so that a strict load reports it.

    rows: of the weight that it belongs to, for scales of blocks in it.
    """
    stem, _, leaf = name.rpartition(".")
    targets = table.get(name) or table.get(f"{stem}.*") or name
    if isinstance(targets, str):
        return {prefix + targets.replace("*", leaf): tensor}
    # What accompanies a quantised weight, such as its scale, belongs to every part of it, unless it is one for each row.
    by_row = leaf in ROW_SCALES and tensor.numel() == len(tensor) > 1 if tensor.ndim else False
    if leaf in ROW_SCALES and tensor.ndim == 2 and tensor.itemsize == 1:
        tensor, by_row = scales_of_parts(tensor, rows, len(targets)), True
    whole = not (by_row or (leaf in ("weight", "bias") and tensor.ndim))
    parts = (tensor,) * len(targets) if whole else tensor.tensor_split(len(targets))
    return {prefix + target.replace("*", leaf): part for target, part in zip(targets, parts, strict=True)}


def _as_linear(name: str, tensor: Tensor, matrices: tuple[str, ...] = POINTWISE) -> Tensor:
    """1x1 convolutions are matrices here. matrices: how the names of these end; by default those of the transformer."""
    return tensor.flatten(1) if name.endswith(matrices) and tensor.ndim == 4 else tensor
