"""Autoencoders from files: which DC-AE it is, and the network with its weights."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..config import (
    AUTOENCODER_SOURCE,
    AUTOENCODERS,
    DOWNSAMPLE,
    HEAD_WIDTH,
    AutoencoderConfig,
    StageConfig,
    TransformerConfig,
)
from ..networks.autoencoder import DCAutoencoder
from ..networks.operations import Operations
from .files import CheckpointError, TensorFile, read_tensors
from .filling import fill
from .header import read_header
from .kinds import describe
from .names import is_autoencoder, to_autoencoder_names
from .numbers import LARGEST, MOST_PARTS, beside, count_parts, number

MOST_STAGES = 16  # that halve the resolution one after another; the deepest release has 8


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


def check_autoencoder(
    autoencoder: AutoencoderConfig, transformer: TransformerConfig, name: str = "the autoencoder"
) -> None:
    """Raises CheckpointError if the latents of an autoencoder are not those that a transformer takes. name: for errors."""
    found = f"f{autoencoder.downsample}c{autoencoder.latent_channels}"
    taken = f"f{DOWNSAMPLE}c{transformer.channels}"
    if found != taken:
        raise CheckpointError(
            f"{name} is a DC-AE {found}, and the transformer takes latents of an {taken}; give one of these, such "
            f"as {AUTOENCODER_SOURCE}"
        )


def detect_autoencoder(tensors: Mapping[str, Tensor], file: TensorFile) -> AutoencoderConfig:
    """The autoencoder, from tensors in our names and the configuration beside them."""
    encoder, decoder = _stages(tensors, "encoder.down_blocks", file), _stages(tensors, "decoder.up_blocks", file)
    attention = any(stage.attention for stage in encoder)
    config = AutoencoderConfig(
        encoder=encoder,
        decoder=decoder,
        latent_channels=_kernel(tensors, r"decoder\.conv_in\.weight", file).shape[1],
        strided_down=_kernel(tensors, r"encoder\.down_blocks\.1\.\d+\.conv\.weight", file).shape[0] == encoder[2].width,
        nearest_up=_kernel(tensors, r"decoder\.up_blocks\.1\.\d+\.conv\.weight", file).shape[0] == decoder[1].width,
        shortcuts=attention,  # only DC-AE 1.5 has neither
        out_activation="relu" if any(stage.attention for stage in decoder) else "silu",
    )
    _check_sizes(config, file.path.name)
    scale = number(file.config, "scaling_factor", beside(file.path.name))
    told = {key: value for key, value in read_header(file).items() if type(value) in (int, float)}
    scale = scale or number(told, "latent_scale", f"the header of {file.path.name}")
    if scale is None:
        rows = [row for row in AUTOENCODERS.values() if replace(row, latent_scale=config.latent_scale) == config]
        scale = rows[0].latent_scale if rows else config.latent_scale
    return replace(config, latent_scale=scale)


def _check_sizes(config: AutoencoderConfig, name: str) -> None:
    """Raises CheckpointError for sizes that no DC-AE has. name: of the file."""
    if len(config.encoder) != len(config.decoder):
        raise CheckpointError(
            f"{name} has {len(config.encoder)} stages that encode and {len(config.decoder)} that decode; it is another model"
        )
    for stage in (*config.encoder, *config.decoder):
        sizes = (stage.width, config.latent_channels, *stage.scales)
        if not all(0 < size <= LARGEST for size in sizes) or stage.depth > MOST_PARTS:
            raise CheckpointError(
                f"{name} has a stage of {stage.depth} blocks with {stage.width} channels, kernels of {stage.scales} and "
                f"{config.latent_channels} latent channels; it is another model"
            )


def _stages(tensors: Mapping[str, Tensor], root: str, file: TensorFile) -> tuple[StageConfig, ...]:
    stages = [_stage(tensors, f"{root}.{i}.") for i in range(count_parts(tensors, root, file.path.name, MOST_STAGES))]
    if len(stages) < 3 or None in stages[1:]:
        raise CheckpointError(f"{file.path.name} lacks tensors of {root}; the download may be incomplete")
    if stages[0] is None:  # it left no tensor; every family doubles the width in the next stage
        stages[0] = replace(stages[1], width=stages[1].width // 2, depth=0)
    for i, stage in enumerate(stages):
        if stage.attention and (stage.width < HEAD_WIDTH or stage.width % HEAD_WIDTH):
            raise CheckpointError(
                f"{file.path.name}: {root}.{i} has {stage.width} channels, which are not heads of {HEAD_WIDTH}; it is another model"
            )
    return tuple(stages)


def _stage(tensors: Mapping[str, Tensor], prefix: str) -> StageConfig | None:
    """The stage whose tensors begin with prefix; None if it is empty."""
    names = [name for name in tensors if name.startswith(prefix)]
    inside = [name for name in names if not re.fullmatch(r"\d+\.conv\.(weight|bias)", name.removeprefix(prefix))]
    attention = any(".attn." in name for name in inside)
    ends = ".attn.to_out.weight" if attention else ".conv1.weight"
    widths = [tensors[name].shape[0] for name in inside if name.endswith(ends) and tensors[name].ndim]
    if not widths:
        return None
    scales = {name.split("to_qkv_multiscale.")[1]: tensors[name] for name in inside if name.endswith(".proj_in.weight")}
    batch_norm = any(name.endswith("running_mean") for name in inside)
    return StageConfig(
        width=widths[0],
        depth=len({name.removeprefix(prefix).split(".")[0] for name in inside}),
        attention=attention,
        scales=tuple(kernel.shape[-1] for kernel in scales.values() if kernel.ndim),
        batch_norm=batch_norm,
        activation="relu" if batch_norm else "silu",  # they come together, in the first DC-AE family
    )


def _kernel(tensors: Mapping[str, Tensor], pattern: str, file: TensorFile) -> Tensor:
    """The convolution kernel with a name of this pattern."""
    found = [name for name in tensors if re.fullmatch(pattern, name)]
    if not found:
        plain = pattern.replace("\\d+", "*").replace("\\", "")
        raise CheckpointError(f"{file.path.name} lacks {plain}; the download may be incomplete")
    if tensors[found[0]].ndim != 4:
        sizes = tuple(tensors[found[0]].shape)
        raise CheckpointError(
            f"{file.path.name}: tensor {found[0]} has shape {sizes} and is no convolution; it is another model"
        )
    return tensors[found[0]]


def autoencoder_tensors(file: TensorFile) -> dict[str, Tensor]:
    """The autoencoder of a file in our names. Raises CheckpointError if there is none."""
    if not is_autoencoder(file.tensors):
        raise CheckpointError(
            f"{file.path.name} is {describe(file.tensors)}; give a DC-AE, such as dc-ae-f32c32-sana-1.1 from "
            f"{AUTOENCODER_SOURCE}"
        )
    return to_autoencoder_names(file.tensors)


def autoencoder_name(config: AutoencoderConfig) -> str:
    """The row of AUTOENCODERS that it is, or "custom"."""
    return next((name for name, row in AUTOENCODERS.items() if row == config), "custom")
