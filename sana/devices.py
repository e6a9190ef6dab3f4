"""What a device can do, where the answer is not the same for all: how much memory is free."""

import torch

FREE_SHARE = 0.8  # of the free memory of a GPU, to take at most


def free_bytes(device: torch.device) -> int | None:
    """What may be taken on a GPU: most of what is free there, and of what PyTorch holds unused. None: not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
