"""Checkpoint files to MODEL, CLIP and VAE."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.patcher_extension
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...sana.checkpoints.files import read_tensors
from ...sana.checkpoints.header import transformer_header
from ...sana.checkpoints.transformer import identify_transformer
from .extension import extend
from .foreign import in_host_formats, unpacked
from .mapping import mapped_by_host
from .model import FILE_NAME, SanaModel
from .run import follow_runs

TABLE = "scale_shift_table"  # the parameters that blocks hold beside their layers


def load_model(
    path: Path, variant: str | None = None, dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> ModelPatcher:
    """The SANA transformer in a file or folder as a MODEL.

    variant: a name from `sana.VARIANTS`, for a file that cannot tell. dtype: of the weights; None: what the host prefers of
    what the model was released in. Raises CheckpointError for files that are something else.
    """
    file = in_host_formats(read_tensors(path, "transformer", mapped=mapped_by_host()))
    file = replace(file, tensors=unpacked(file.tensors, dtype, file.path.name))
    header = transformer_header(identify_transformer(file, variant))
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(file.tensors),
        model_options={"dtype": dtype} if dtype else {},
        metadata={**file.metadata, **header, FILE_NAME: file.path.name},
        disable_dynamic=disable_dynamic,
    )
    patcher.cached_patcher_init = (load_model, (path, variant, dtype))
    return patcher


def extend_loading() -> None:
    """Let every MODEL of ours that the host loads, by whatever node, know its runs and patch its tables."""
    for name in ("load_diffusion_model_state_dict", "load_state_dict_guess_config"):
        extend(comfy.sd, name, _load_prepared)


def _load_prepared(original: Callable[..., object], *arguments: object, **named: object) -> object:
    loaded = original(*arguments, **named)
    patcher = loaded[0] if isinstance(loaded, tuple) else loaded
    if isinstance(getattr(patcher, "model", None), SanaModel):
        follow_runs(patcher)
        patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, TABLE, _patch_tables)
    return loaded


def _patch_tables(patcher: ModelPatcher, device: torch.device, *unused: object) -> None:
    """Patch what the host leaves alone when it loads a model: it patches layers, not parameters of what has layers in it."""
    for key in patcher.patches:
        if key.endswith(TABLE) and key not in patcher.backup:
            patcher.patch_weight_to_device(key, device)
