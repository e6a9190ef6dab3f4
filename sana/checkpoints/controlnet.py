"""ControlNets from files."""

from pathlib import Path
from types import ModuleType

import torch

from ..networks.controlnet import SanaControlNet
from ..networks.operations import Operations
from .files import CheckpointError, read_tensors
from .filling import fill
from .kinds import describe
from .names import is_controlnet, to_control_names
from .packing import with_packed
from .transformer import detect_transformer


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
