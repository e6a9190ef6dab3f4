"""What we add to the host, so that its own loaders and samplers know SANA. Every addition is for SANA alone, and made once."""

from collections.abc import Callable, Mapping

import comfy.k_diffusion.sampling
import comfy.model_detection
import comfy.samplers
import comfy.supported_models
from torch import Tensor

from ...sana.checkpoints.files import unwrapped
from ...sana.checkpoints.names import is_transformer
from .checkpoint import extend_loading
from .extension import extend
from .lora import extend_loras
from .masks import extend_masks
from .model import SanaConfig, detect
from .preview import extend_previews
from .sampler import SAMPLER_FUNCTIONS


def register() -> None:
    """Detection and loading of SANA transformers, LoRA files, masks, previews, and our solvers in the list of KSampler."""
    _extend_detection()
    extend_loading()
    extend_loras()
    extend_masks()
    extend_previews()
    for name, sample in SAMPLER_FUNCTIONS.items():
        if name not in comfy.samplers.SAMPLER_NAMES:
            setattr(comfy.k_diffusion.sampling, f"sample_{name}", sample)
            comfy.samplers.SAMPLER_NAMES.append(name)
            comfy.samplers.KSAMPLER_NAMES.append(name)


def _extend_detection() -> None:
    """Ahead of the host's own rules, which take SANA for PixArt."""
    if extend(comfy.model_detection, "detect_unet_config", _detect_unet_config):
        comfy.supported_models.models.append(SanaConfig)


def _detect_unet_config(
    original: Callable[..., dict[str, object] | None],
    state_dict: Mapping[str, Tensor],
    key_prefix: str,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, object] | None:
    names = unwrapped({name.removeprefix(key_prefix): None for name in state_dict if name.startswith(key_prefix)})
    if is_transformer(names):
        return detect(state_dict, key_prefix, metadata)
    return original(state_dict, key_prefix, metadata=metadata)
