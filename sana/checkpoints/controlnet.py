"""ControlNets from files."""

from pathlib import Path
from types import ModuleType

import torch

from ..config import TransformerConfig
from ..networks.controlnet import SanaControlNet
from ..networks.operations import Operations
from .files import CheckpointError, read_tensors
from .filling import fill
from .kinds import describe
from .names import is_controlnet, to_control_names
from .packing import with_packed
from .transformer import detect_transformer


def check_controlnet(controlnet: TransformerConfig, transformer: TransformerConfig) -> None:
    """Raises CheckpointError for a transformer that a ControlNet cannot correct."""
    if transformer.guidance_embed:
        raise CheckpointError("SANA-Sprint takes no ControlNet; use the SANA model that this one was made for")
    if transformer.qk_norm != controlnet.qk_norm:
        made_for, given = ("SANA-1.5", "SANA") if controlnet.qk_norm else ("SANA", "SANA-1.5")
        raise CheckpointError(
            f"this ControlNet was made for {made_for}, and the model is a {given}; use a {made_for} model"
        )
    for width, theirs, what in (
        (controlnet.hidden_size, transformer.hidden_size, "is {} wide and the SANA model {}"),
        (controlnet.text_width, transformer.text_width, "takes texts of width {} and the SANA model of width {}"),
    ):
        if width != theirs:
            raise CheckpointError(f"this ControlNet {what.format(width, theirs)}; use the one of its size")


def load_controlnet(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    operations: type | ModuleType = Operations,
) -> SanaControlNet:
    """The ControlNet of an official checkpoint, which also holds its transformer, or of a diffusers folder.

    Raises CheckpointError if the file has none.
    """
    file = read_tensors(path, "controlnet")
    if not is_controlnet(file.tensors):
        raise CheckpointError(f"{file.path.name} is {describe(file.tensors)}; give a ControlNet for SANA")
    file = with_packed(file)
    tensors = to_control_names(file.tensors)
    network = SanaControlNet(detect_transformer(tensors, file), operations=operations, dtype=dtype, device="meta")
    return fill(network, tensors, file.path.name, dtype, device)
