"""LoRA files of SANA for the host's own loaders, by the tables of `sana/checkpoints/adapters.py`."""

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...sana.checkpoints.adapters import (
    TEXT_LAYER,
    describe_lora,
    layer_names,
    layers_of,
    prepare,
    read_settings,
    text_layer_names,
    with_matrices,
)
from ...sana.checkpoints.names import POINTWISE
from .clip import SanaTextModel
from .extension import extend
from .model import SanaModel

KeyMap = dict[str, object]
SETTINGS = "sana_adapter_settings"  # attribute of the tensors of a LoRA file: what PEFT tells of it outside of them
TEXT_LAYERS = ".transformer.model."  # in names of our text encoder; the path of a layer stands behind it

log = logging.getLogger(__name__)


class SanaKeyMap(KeyMap):
    """The names of a SANA model and its text encoder, by whose class `load_lora` knows what the file is for."""

    sprint: bool | None = None  # None: there is no SANA model, only its text encoder
    rows: Mapping[str, int] = MappingProxyType({})  # of the weights of the transformer, by name


def extend_loras() -> None:
    """Teach the functions that every LoRA loader of the host calls the names, strengths and shapes, for SANA only."""
    extend(comfy.utils, "load_torch_file", _with_settings)
    extend(comfy.lora, "model_lora_keys_unet", _with_names)
    extend(comfy.lora, "model_lora_keys_clip", _with_text_names)
    extend(comfy.lora, "load_lora", _prepared)


def _with_settings(original: Callable[..., object], ckpt: str, *more: object, **named: object) -> object:
    """Loaders pass the tensors of a LoRA on, and nothing else, so what PEFT tells of it goes with these."""
    loaded = original(ckpt, *more, **named)
    found = loaded[0] if isinstance(loaded, tuple) else loaded
    tensors = _tensors(found) if isinstance(found, dict) else {}
    if layers_of(tensors):
        settings = read_settings(_metadata(Path(ckpt)), Path(ckpt))
        for tensor in tensors.values() if settings else ():
            setattr(tensor, SETTINGS, settings)
    return loaded


def _tensors(found: Mapping[object, object]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except (SafetensorError, OSError):  # a PyTorch file
        return None


def _with_names(
    original: Callable[..., KeyMap], model: comfy.model_base.BaseModel, key_map: KeyMap | None = None
) -> KeyMap:
    keys = original(model, {} if key_map is None else key_map)
    if not isinstance(model, SanaModel):
        return keys
    found = SanaKeyMap(keys)
    found.sprint = model.identity.config.guidance_embed
    tensors = model.state_dict()
    found.rows = {name: len(tensor) for name, tensor in tensors.items() if tensor.ndim}
    for name in tensors:
        if name.startswith("diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("diffusion_model.").removesuffix(".weight")
            found.update(dict.fromkeys(layer_names(path), name))
    return found


def _with_text_names(original: Callable[..., KeyMap], model: nn.Module, key_map: KeyMap | None = None) -> KeyMap:
    keys = original(model, {} if key_map is None else key_map)
    if not isinstance(model, SanaTextModel):
        return keys
    found = SanaKeyMap(keys)
    if isinstance(keys, SanaKeyMap):
        found.sprint, found.rows = keys.sprint, keys.rows
    for name in model.state_dict():
        if TEXT_LAYERS in name and name.endswith(".weight"):
            path = name.split(TEXT_LAYERS)[1].removesuffix(".weight")
            found.update(dict.fromkeys(text_layer_names(path), name))
    return found


def _prepared(
    original: Callable[..., dict[str, object]],
    lora: dict[str, Tensor],
    to_load: KeyMap,
    log_missing: bool = True,
) -> dict[str, object]:
    """Raises ValueError for a file of which nothing fits. log_missing: whether `to_load` is all that the file may be for."""
    if not isinstance(to_load, SanaKeyMap):
        return original(lora, to_load, log_missing)
    settings = next((getattr(tensor, SETTINGS) for tensor in lora.values() if hasattr(tensor, SETTINGS)), {})
    numbers = {name: torch.tensor(value) for name, value in lora.items() if type(value) in (int, float)}
    lora = prepare({**_tensors(lora), **numbers}, settings, sprint=bool(to_load.sprint))
    loaded = original(with_matrices(lora, convolutions(to_load)), to_load, log_missing)
    if to_load.sprint is not None:
        _check_fit(lora, loaded, to_load, log_missing)
    return {key: scaling_rows(change) for key, change in loaded.items()}


def convolutions(keys: KeyMap) -> tuple[str, ...]:
    """What a LoRA file calls the layers that are 1x1 convolutions in it and matrices here."""
    return tuple(name for name, weight in keys.items() if isinstance(weight, str) and weight.endswith(POINTWISE))


def _check_fit(lora: dict[str, Tensor], loaded: Mapping[str, object], keys: SanaKeyMap, whole: bool) -> None:
    """whole: `keys` are all that the file may be for; otherwise the rest may fit elsewhere."""
    if lora and not loaded:
        message = f"nothing of this LoRA fits SANA: its names are those of {describe_lora(lora)}"
        if whole:
            raise ValueError(f"{message}, first {next(iter(lora))}; use a LoRA made for this SANA model")
        if not any(TEXT_LAYER.search(name) for name in lora):
            log.warning(message)
    for key, change in loaded.items():
        rows = _rows(change)
        if rows is not None and rows != keys.rows.get(key, rows):
            raise ValueError(
                f"this LoRA was made for another SANA: it changes {rows} rows of {key}, which has {keys.rows[key]} in this "
                "model; use a LoRA made for it"
            )
    layers = layers_of(lora)
    fitting = layers & keys.keys()
    if whole and len(fitting) < len(layers):
        log.warning("%d of the %d layers of this LoRA fit the model; the rest has no effect", len(fitting), len(layers))


def _rows(change: object) -> int | None:
    """How many rows a change of a weight has; None: it does not say."""
    if isinstance(change, tuple):  # a difference or a replacement: its kind, and the tensor
        return len(change[1][0])
    reshaped = isinstance(change, LoRAAdapter) and change.weights[5] is not None
    return len(change.weights[0]) if isinstance(change, (LoRAAdapter, LoHaAdapter)) and not reshaped else None


class RowScales:
    """DoRA with a scale for every row: the changed weight has its rows brought to these lengths.

    arXiv 2402.09353, equation 5, as PEFT and LyCORIS have it. The host divides by the rows of the weight before its change.
    """

    scale_place: int  # in `weights`

    def calculate_weight(self, weight: Tensor, key: str, strength: float, *more: object, **named: object) -> Tensor:
        """Called by the host to change a weight in its place."""
        scale, place = self.weights[self.scale_place], self.scale_place
        if scale is None or scale.shape[0] != weight.shape[0]:
            return super().calculate_weight(weight, key, strength, *more, **named)
        plain = copy.copy(self)
        plain.weights = (*self.weights[:place], None, *self.weights[place + 1 :])
        changed = plain.calculate_weight(weight.clone(), key, 1.0, *more, **named)
        lengths = changed.float().flatten(1).norm(dim=1)
        factors = scale.to(changed.device, torch.float32).flatten() / (lengths + torch.finfo(torch.float32).eps)
        changed = changed * factors.reshape(-1, *[1] * (changed.dim() - 1)).to(changed.dtype)
        return weight.add_(strength * (changed - weight))

    def h(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Called by the host to run beside a layer, where there is no weight whose rows could be scaled."""
        if self.weights[self.scale_place] is not None:
            raise ValueError("this LoRA is a DoRA, which cannot run beside the layers; use Load LoRA without bypass")
        return super().h(x, base_out)


class RowScaledLoRA(RowScales, LoRAAdapter):
    scale_place = 4


class RowScaledLoHa(RowScales, LoHaAdapter):
    scale_place = 7


class RowScaledLoKr(RowScales, LoKrAdapter):
    scale_place = 8


ROW_SCALED = {LoRAAdapter: RowScaledLoRA, LoHaAdapter: RowScaledLoHa, LoKrAdapter: RowScaledLoKr}


def scaling_rows(change: object) -> object:
    """The same change of a weight, which scales rows rightly if it is a DoRA."""
    kind = ROW_SCALED.get(type(change))
    if kind is None or change.weights[kind.scale_place] is None:
        return change
    return kind(change.loaded_keys, change.weights)
