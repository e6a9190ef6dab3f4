"""LoRA files of SANA for the host's own loaders, by the tables of `sana/checkpoints/adapters.py`."""

from collections.abc import Callable

import comfy.lora
import comfy.model_base
from torch import Tensor

from ...sana.checkpoints.adapters import layer_names, with_matrices
from ...sana.checkpoints.names import POINTWISE
from .extension import extend
from .model import SanaModel

KeyMap = dict[str, object]


class SanaKeyMap(KeyMap):
    """The names of a SANA model, by whose class `load_lora` knows what the file is for."""


def sana_lora_keys(model: comfy.model_base.BaseModel) -> KeyMap:
    """Names of layers in LoRA files, and the weight or the part of a weight each is for."""
    keys: KeyMap = {}
    for name in model.state_dict():
        if name.startswith("diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("diffusion_model.").removesuffix(".weight")
            keys.update(dict.fromkeys(layer_names(path), name))
    return keys


def convolutions(keys: KeyMap) -> tuple[str, ...]:
    """What a LoRA file calls the layers that are 1x1 convolutions in it and matrices here."""
    return tuple(name for name, weight in keys.items() if isinstance(weight, str) and weight.endswith(POINTWISE))


def extend_loras() -> None:
    """Teach the functions that every LoRA loader of the host calls the names and the shapes, for SANA models only."""
    extend(comfy.lora, "model_lora_keys_unet", _with_names)
    extend(comfy.lora, "load_lora", _with_shapes)


def _with_names(
    original: Callable[..., KeyMap], model: comfy.model_base.BaseModel, key_map: KeyMap | None = None
) -> KeyMap:
    keys = original(model, {} if key_map is None else key_map)
    if not isinstance(model, SanaModel):
        return keys
    keys.update(sana_lora_keys(model))
    return SanaKeyMap(keys)


def _with_shapes(
    original: Callable[..., dict[str, object]],
    lora: dict[str, Tensor],
    to_load: KeyMap,
    *more: object,
    **named: object,
) -> dict[str, object]:
    if isinstance(to_load, SanaKeyMap):
        lora = with_matrices(lora, convolutions(to_load))
    return original(lora, to_load, *more, **named)
