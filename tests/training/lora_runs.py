"""A short training of a LoRA, and what is trained on where no model is needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sana.config import TransformerConfig
from sana.training.__main__ import main
from sana.training.demo import TRANSFORMER
from sana.training.flow import FlowBatch

SMALL = replace(TRANSFORMER, hidden_size=64, depth=2, cross_heads=2, text_width=24, ff_width=80)


def lora(pictures: Path, folder: Path, *more: str) -> int:
    command = ["lora", "--data", str(pictures), "--out", str(folder), "--steps=2", "--learning-rate=1e-2"]
    return main([*command, "--sheet-every=0", "--rank=4", *more])


def random_batches(config: TransformerConfig) -> Callable[[int, int], FlowBatch]:
    def batch(number: int, process: int) -> FlowBatch:
        generator = torch.Generator().manual_seed(number)
        latents, text = (torch.randn(*size, generator=generator) for size in ((2, 32, 4, 6), (2, 5, config.text_width)))
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        return FlowBatch(latents, text=text, text_mask=mask, seed=number)

    return batch


def as_convolutions(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights with the axes that diffusers' network has them with."""
    return {name: state[name].view(tensor.shape) for name, tensor in network.state_dict().items()}


def same(one: Path, two: Path) -> bool:
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
