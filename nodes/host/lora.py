"""LoRA names: what trainers call the layers of SANA, for the host's own LoRA loaders."""

import functools
from collections.abc import Callable

import comfy.lora
import comfy.model_base

from .model import SanaModel

# What stands before a module path: PEFT in diffusers, PEFT alone, and (with _ for .) LyCORIS, OneTrainer and kohya.
DOTTED = ("transformer.", "base_model.model.", "")
UNDERSCORED = ("lycoris_", "lora_transformer_", "lora_unet_")

KeyMap = dict[str, object]


def sana_lora_keys(model: comfy.model_base.BaseModel) -> KeyMap:
    """Names of layers in LoRA files, and the weight or the part of a weight each is for."""
    keys: KeyMap = {}
    for name in model.state_dict():
        if name.startswith("diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("diffusion_model.").removesuffix(".weight")
            keys.update({prefix + path: name for prefix in DOTTED})
            keys.update({prefix + path.replace(".", "_"): name for prefix in UNDERSCORED})
    return keys


def extend_lora_keys() -> None:
    """Teach `comfy.lora.model_lora_keys_unet` the names, for SANA models only."""
    original: Callable[..., KeyMap] = comfy.lora.model_lora_keys_unet
    if getattr(original, "knows_sana", False):
        return

    @functools.wraps(original)
    def model_lora_keys_unet(model: comfy.model_base.BaseModel, key_map: KeyMap | None = None) -> KeyMap:
        keys = original(model, {} if key_map is None else key_map)
        if isinstance(model, SanaModel):
            keys.update(sana_lora_keys(model))
        return keys

    model_lora_keys_unet.knows_sana = True
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet
