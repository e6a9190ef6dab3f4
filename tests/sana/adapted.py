"""Twins with adapters: diffusers' transformer with a random adapter of PEFT, and the files that trainers write of it."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SanaPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.config import TransformerConfig
from tests.sana.twins import diffusers_transformer, randomise


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str, str | None]]:
    return lambda path: (f"{prefix}{path}.{down}", f"{prefix}{path}.{up}", None)


def underscored(prefix: str) -> Callable[[str], tuple[str, str, str | None]]:
    def names(path: str) -> tuple[str, str, str]:
        flat = prefix + path.replace(".", "_")
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"

    return names


# Names of the smaller matrix, the larger one and the scale, by layer; without a scale, alpha is the rank.
TRAINERS = {
    "diffusers": dotted("transformer.", "lora_A.weight", "lora_B.weight"),
    "PEFT": dotted("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "PEFT in diffusers": dotted("transformer.base_model.model.", "lora_A.weight", "lora_B.weight"),
    "PEFT, named adapter": dotted("transformer.", "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": underscored("lora_unet_"),
    "OneTrainer": underscored("lora_transformer_"),
    "LyCORIS": underscored("lycoris_"),
    "the host": dotted("diffusion_model.", "lora_down.weight", "lora_up.weight"),
}


def adapted(structure: TransformerConfig, config: PeftConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """diffusers' network with a random adapter, and its weights before."""
    torch.manual_seed(0)
    network = randomise(diffusers_transformer(structure))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.add_adapter(config)
    for name, parameter in network.named_parameters():
        if any(part in name for part in ("lora_", "lokr_", "hada_")):
            nn.init.normal_(parameter.data, std=0.2)
            if "magnitude" in name:
                parameter.data = parameter.data.abs() + 0.5
    return network, before


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapted layers as PEFT merges them."""
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "base_layer")}
    for layer in layers.values():
        layer.merge()
    return {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items() if hasattr(layer, "merge")}


def save_as_diffusers(network: nn.Module, folder: Path) -> Path:
    """As its training script for SANA writes it: rank and alpha in the header alone."""
    SanaPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(network),
        **_collate_lora_metadata({"transformer": network}),
    )
    return folder / "pytorch_lora_weights.safetensors"


def save_as_peft(network: nn.Module, folder: Path, name: str = "adapter_model.safetensors") -> Path:
    """As `PeftModel.save_pretrained` writes it: an adapter_config.json beside the tensors."""
    tensors = {f"base_model.model.{key}": part for key, part in get_peft_model_state_dict(network).items()}
    folder.mkdir(exist_ok=True)
    save_file({key: part.contiguous() for key, part in tensors.items()}, folder / name)
    network.peft_config["default"].save_pretrained(folder)
    return folder / name
