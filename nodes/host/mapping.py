"""Files of weights mapped into memory by the host, where it brings them to the device straight from the disk.

It knows where in a file the storage of a tensor lies, which is true of a view of all of it and not of a copy.
"""

from collections.abc import Mapping
from pathlib import Path

from comfy import memory_management, utils
from torch import Tensor

from ...sana.checkpoints.files import Mapped


def mapped_by_host() -> Mapped | None:
    """How this host opens safetensors for itself, for `read_tensors`; None: as anybody does."""
    streams = getattr(memory_management, "aimdo_enabled", False) and hasattr(utils, "load_safetensors")
    return _tensors if streams else None


def _tensors(path: Path) -> Mapping[str, Tensor] | None:
    """None for formats of numbers that the host does not know, and where it cannot map the file."""
    try:
        return utils.load_safetensors(str(path))[0]
    except (KeyError, RuntimeError):
        return None
