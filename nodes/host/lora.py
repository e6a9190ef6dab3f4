"""LoRA files of SANA for the host's own loaders: what trainers call its layers, and the shapes they give its convolutions."""

from collections.abc import Callable

import comfy.lora
import comfy.model_base
from torch import Tensor

from ...sana.checkpoints.names import POINTWISE
from .extension import extend
from .model import SanaModel

# What stands before a module path: PEFT in diffusers, PEFT alone, and (with _ for .) LyCORIS, OneTrainer and kohya.
DOTTED = ("transformer.", "base_model.model.", "")
UNDERSCORED = ("lycoris_", "lora_transformer_", "lora_unet_")
# Ends of the names of what stands between two factors in a Tucker decomposition: the host wants all of its axes.
CORES = (".lora_mid.weight", ".hada_t1", ".hada_t2", ".lokr_t2")

KeyMap = dict[str, object]


class SanaKeyMap(KeyMap):
    """The names of a SANA model, by whose class `load_lora` knows what the file is for."""


def sana_lora_keys(model: comfy.model_base.BaseModel) -> KeyMap:
    """Names of layers in LoRA files, and the weight or the part of a weight each is for."""
    keys: KeyMap = {}
    for name in model.state_dict():
        if name.startswith("diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("diffusion_model.").removesuffix(".weight")
            keys.update({prefix + path: name for prefix in DOTTED})
            keys.update({prefix + path.replace(".", "_"): name for prefix in UNDERSCORED})
    return keys


def with_matrices(lora: dict[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """A LoRA file in which what changes a 1x1 convolution has two axes, as our weight has."""
    weights = ((name, weight) for name, weight in keys.items() if isinstance(weight, str))
    layers = tuple(name for name, weight in weights if weight.endswith(POINTWISE))
    matrices = {
        name: tensor.flatten(1)
        for name, tensor in lora.items()
        if name.startswith(layers) and not name.endswith(CORES) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    }
    return {**lora, **matrices}


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
        lora = with_matrices(lora, to_load)
    return original(lora, to_load, *more, **named)
