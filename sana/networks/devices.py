"""What a device can do, where the answer is not the same for all: arithmetic in bfloat16, and how much memory is free."""

import torch

FREE_SHARE = 0.8  # of the free memory of a GPU, to take at most


def checked_device(name: str | None) -> str:
    """A device, or the best one. Raises ValueError for one that PyTorch does not know, was not built for, or does not find."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).add(1).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"device {name} cannot be used ({reason}); give another, such as cpu") from error
    return name


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has arithmetic in bfloat16: GPUs before NVIDIA's Ampere emulate it, slowly and in more memory."""
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def free_bytes(device: torch.device, share: float = FREE_SHARE) -> int | None:
    """What may be taken on a GPU: most of what is free there, and of what PyTorch holds unused. None: not known.

    share: of these, to take.
    """
    backend = getattr(torch, device.type, None)  # such as torch.cuda
    if not hasattr(backend, "mem_get_info"):
        return None
    try:
        free = backend.mem_get_info(device)[0]
    except RuntimeError:  # some GPUs of Intel cannot tell
        return None
    if hasattr(backend, "memory_reserved"):
        free += backend.memory_reserved(device) - backend.memory_allocated(device)
    return int(share * free)
