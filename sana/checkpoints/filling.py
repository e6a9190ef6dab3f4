"""Networks get their weights: every tensor there, none left over, of the right shape and in numbers to compute with."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..networks.adapters import Merge
from ..networks.autoencoder import DCAutoencoder
from ..networks.packed import PackedWeight
from ..networks.packed_layers import put_weight
from .files import CheckpointError
from .formats import companions
from .packing import FP8_DTYPES

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NO_MERGES: Mapping[str, Merge] = MappingProxyType({})


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    merges: Mapping[str, Merge] = NO_MERGES,
) -> nn.Module:
    """Give a network on meta its tensors, one at a time in dtype and on device. name: of the file, for errors.

    merges: what becomes of some weights, by name, before they get this dtype. Packed weights stay packed, are merged whenever
    they are unpacked, and give numbers in dtype. With a dtype, copies are made even of tensors that have it already, since
    a file that shrinks while it is mapped ends the process. None: tensors stay as they are and where they are, and packed
    ones give numbers in the dtype of the others.

    Raises CheckpointError as `check_numbers` and `check_tensors` do.
    """
    check_numbers(network, tensors, name)
    expected = network.state_dict()
    check_tensors(expected, tensors, name)
    packed = {key: weight for key, weight in tensors.items() if isinstance(weight, PackedWeight)}
    plain = {key: tensor for key, tensor in tensors.items() if key not in packed}
    placed = {
        key: _placed(merges[key](tensor), dtype or tensor.dtype, device)
        if key in merges
        else _placed(tensor, dtype, device)
        for key, tensor in plain.items()
    }
    network.load_state_dict(placed, strict=False, assign=True)  # for want of the packed ones; all have been checked
    given = dtype or next((t.dtype for t in plain.values() if t.dtype in FLOAT_DTYPES), torch.float32)
    for key, weight in packed.items():
        whole = weight.cut_to(expected[key].shape)
        if dtype is not None:
            whole = whole.copied()
        if key in merges:
            whole.changes.append(merges[key])
        put_weight(network, key, whole.to(device, given))
    return network.eval().requires_grad_(False)


def check_numbers(
    network: nn.Module, tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Raises CheckpointError if the weights of a network are quantised or in another dtype. name: of the file."""
    scales = companions(tensors)
    if scales:
        raise CheckpointError(
            f"{name} is quantised, with {scales[0]} beside its weights, in a way that is not read here; take a file that is not"
        )
    expected = network.state_dict()
    for key, tensor in tensors.items():
        if key in expected and expected[key].is_floating_point() and tensor.dtype not in dtypes:
            stored = str(tensor.dtype).removeprefix("torch.")
            convertible = isinstance(network, DCAutoencoder) and tensor.dtype in FP8_DTYPES
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
        fits = tensor.fits if isinstance(tensor, PackedWeight) else tensor.shape.__eq__
        if not fits(expected[key].shape):
            sizes = f"{tuple(tensor.shape)} instead of {tuple(expected[key].shape)}"
            raise CheckpointError(
                f"{name}: tensor {key} has shape {sizes}; it is another model or was made for another size"
            )


def placed_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """What a network will take that `fill` gives these tensors in this dtype."""
    return sum(_placed_bytes(tensor, dtype or tensor.dtype) for tensor in tensors.values())


def _placed_bytes(tensor: Tensor | PackedWeight, dtype: torch.dtype) -> int:
    if isinstance(tensor, PackedWeight):
        return sum(part.nbytes for part in tensor.parts.values())
    return tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=dtype is not None)
