"""Transformers and autoencoders from files: detection, renaming and strict loading."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import DOWNSAMPLE, AutoencoderConfig, TransformerConfig
from ..networks.autoencoder import DCAutoencoder
from ..networks.operations import Operations
from ..networks.transformer import SanaTransformer
from ..text.gemma import Gemma2
from .detection import (
    AUTOENCODER_SOURCE,
    autoencoder_tensors,
    detect_autoencoder,
    identify_transformer,
    transformer_tensors,
)
from .files import CheckpointError, TensorFile, read_tensors

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CONVERTIBLE = (SanaTransformer, DCAutoencoder)  # what `inspection.convert` writes
HOST_QUANTISED = ("comfy_quant", "scaled_fp8")  # how names end by which ComfyUI knows quantised weights
HOST_READS = (SanaTransformer, Gemma2)  # with such weights
BITSANDBYTES = (".absmax", ".quant_map", ".SCB")  # what it keeps beside packed matrices
QUANTISED = (*HOST_QUANTISED, "scale_weight", "weight_scale", *BITSANDBYTES)


def load_transformer(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    operations: type | ModuleType = Operations,
) -> SanaTransformer:
    """A SANA transformer from an official `.pth`, a `.safetensors` in any naming, or a diffusers folder.

    dtype: of the weights; None: as in the file. variant: a name from VARIANTS, for a file that cannot tell 1K from 2K or 4K.
    Raises CheckpointError if the file is no SANA transformer or lacks tensors, ValueError for an unknown variant.
    """
    file = read_tensors(path, "transformer")
    return build_transformer(file, identify_transformer(file, variant).config, dtype, device, operations)


def build_transformer(
    file: TensorFile,
    config: TransformerConfig,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    operations: type | ModuleType = Operations,
) -> SanaTransformer:
    """The transformer of an opened file, as `identify_transformer` found it."""
    network = SanaTransformer(config, operations=operations, dtype=dtype, device="meta")
    return fill(network, transformer_tensors(file), file.path.name, dtype, device)


def load_autoencoder(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    operations: type | ModuleType = Operations,
) -> DCAutoencoder:
    """A DC-AE from a `.safetensors` or PyTorch file in original or diffusers names, or a diffusers folder.

    Raises CheckpointError if the file is no DC-AE or lacks tensors.
    """
    file = read_tensors(path, "vae")
    tensors = autoencoder_tensors(file)
    config = detect_autoencoder(tensors, file)
    return fill(
        DCAutoencoder(config, operations=operations, dtype=dtype, device="meta"), tensors, file.path.name, dtype, device
    )


def check_autoencoder(autoencoder: AutoencoderConfig, transformer: TransformerConfig) -> None:
    """Raises CheckpointError if the latents of an autoencoder are not those that a transformer takes."""
    found = f"f{autoencoder.downsample}c{autoencoder.latent_channels}"
    taken = f"f{DOWNSAMPLE}c{transformer.channels}"
    if found != taken:
        raise CheckpointError(
            f"the autoencoder is a DC-AE {found}, and the transformer takes latents of an {taken}; give one of these, such "
            f"as {AUTOENCODER_SOURCE}"
        )


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
    scales = sorted(key for key in tensors if key.endswith(QUANTISED))
    if scales:
        hosted = isinstance(network, HOST_READS) and any(key.endswith(HOST_QUANTISED) for key in scales)
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
