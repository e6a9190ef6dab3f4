"""Small models with random weights in the form of released files: same names of tensors and same companions, fewer channels."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana.checkpoints.text_encoder import gemma_json
from sana.config import VARIANTS, TransformerConfig
from sana.networks.controlnet import SanaControlNet
from sana.text.tokenizers import END_OF_TURN, START_OF_TURN
from tests.host.server import Server
from tests.sana import dialects, models, twins

WIDTH = 224  # the smallest whose cross-attention heads can be told without a configuration: two of 112
Tensors = dict[str, Tensor]


def transformer_config(variant: str) -> TransformerConfig:
    row = VARIANTS[variant].transformer
    return replace(row, hidden_size=WIDTH, depth=2, cross_heads=2, ff_width=256, text_width=models.TEXT_WIDTH)


def official_transformer(variant: str) -> Tensors:
    """As in a `.pth` of Efficient-Large-Model."""
    torch.manual_seed(0)
    network = twins.randomise(twins.diffusers_transformer(transformer_config(variant)))
    return dialects.official_transformer(network.state_dict(), (VARIANTS[variant].base_size // 32) ** 2)


def controlnet(variant: str) -> Tensors:
    """For the transformer of this variant, of two blocks, with our own names."""
    return twins.randomise(SanaControlNet(replace(transformer_config(variant), control_blocks=2)), seed=5).state_dict()


def text_encoder() -> Tensors:
    """As in a `gemma_2_2b_it_elm_*.safetensors`, with its tokenizer. Being small, it says its sizes, too."""
    companions = {
        "spiece_model": models.tokenizer_model(START_OF_TURN, END_OF_TURN),
        "gemma_config": json.dumps(gemma_json(models.GEMMA)).encode(),
    }
    weights = {f"model.{name}": tensor for name, tensor in models.gemma().state_dict().items()}
    return {
        **weights,
        **{name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in companions.items()},
    }


def autoencoder() -> Tensors:
    """As in a `diffusion_pytorch_model.safetensors` of mit-han-lab."""
    return models.autoencoder().state_dict()


def lora(variant: str, rank: int = 4, seed: int = 1) -> Tensors:
    """As in a `pytorch_lora_weights.safetensors` of diffusers' training script."""
    torch.manual_seed(seed)
    found = {}
    for block in range(transformer_config(variant).depth):
        for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v"):
            name = f"transformer.transformer_blocks.{block}.{layer}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, WIDTH) * WIDTH**-0.5
            found[f"{name}.lora_B.weight"] = torch.randn(WIDTH, rank) * rank**-0.5
    return found


@contextmanager
def placed(server: Server, files: Mapping[str, Tensors]) -> Iterator[None]:
    """Files below the server's models, such as "vae/a.safetensors", for a while: `auto` would find them in other tests."""
    paths = {server.base / "models" / name: tensors for name, tensors in files.items()}
    try:
        for path, tensors in paths.items():
            write(path, tensors)
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def write(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
