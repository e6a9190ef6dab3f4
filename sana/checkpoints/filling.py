"""Networks get their weights: every tensor there, none left over, of the right shape and in numbers to compute with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..networks.autoencoder import DCAutoencoder
from ..networks.transformer import SanaTransformer
from ..text.gemma import Gemma2
from .files import CheckpointError
from .formats import companions, host_reads

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CONVERTIBLE = (SanaTransformer, DCAutoencoder)  # what `writing.convert` writes
HOST_READS = (SanaTransformer, Gemma2)  # what the host computes with in its own quantised formats


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> nn.Module:
    """Give a network on meta its tensors, one at a time in dtype and on device. name: of the file, for errors.

    Raises CheckpointError as `check_numbers` and `check_tensors` do.
    """
    check_numbers(network, tensors, name)
    check_tensors(network.state_dict(), tensors, name)
    network.load_state_dict(
        {key: _placed(tensor, dtype, device) for key, tensor in tensors.items()}, strict=True, assign=True
    )
    return network.eval().requires_grad_(False)


def check_numbers(
    network: nn.Module, tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Raises CheckpointError if the weights of a network are quantised or in another dtype. name: of the file."""
    scales = companions(tensors)
    if scales:
        hosted = isinstance(network, HOST_READS) and host_reads(scales)
        advice = "load it in ComfyUI, or take" if hosted else "take"
        raise CheckpointError(f"{name} is quantised, with {scales[0]} beside its weights; {advice} a file that is not")
    expected = network.state_dict()
    for key, tensor in tensors.items():
        if key in expected and expected[key].is_floating_point() and tensor.dtype not in dtypes:
            stored = str(tensor.dtype).removeprefix("torch.")
            convertible = isinstance(network, CONVERTIBLE) and tensor.dtype in FP8_DTYPES
            advice = ", which `python -m sana convert --dtype bfloat16` makes of it" if convertible else ""
            raise CheckpointError(
                f"{name} holds {stored} tensors, first {key}, which this package cannot compute with; use a float32, float16 or "
                f"bfloat16 file{advice}"
            )


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError if a tensor is missing, left over or of another shape than expected. name: of the file."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}; the download may be incomplete"
        )
    if extra:
        count = "1 tensor that does" if len(extra) == 1 else f"{len(extra)} tensors that do"
        raise CheckpointError(f"{name} has {count} not belong to it, first {extra[0]}; it is another model")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            sizes = f"{tuple(tensor.shape)} instead of {tuple(expected[key].shape)}"
            raise CheckpointError(
                f"{name}: tensor {key} has shape {sizes}; it is another model or was made for another size"
            )


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
