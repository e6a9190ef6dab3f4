"""Networks at their real sizes with random weights: ours and the reference's, sharing one set of tensors."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from sana.checkpoints.names import to_transformer_names
from sana.checkpoints.text_encoder import gemma_json
from sana.checkpoints.writing import autoencoder_json, transformer_json
from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2
from sana.text.text_encoder import BOS, GemmaTextEncoder

GEMMA_2_2B = GemmaConfig()


class WordTokenizer:
    """Stands for Gemma's tokenizer, whose file cannot be had without its licence: one token for each word and mark."""

    def encode(self, text: str) -> list[int]:
        return [BOS, *(3 + hash_word(word) % 250_000 for word in text.split())]


class PaddingTokenizer(WordTokenizer):
    """The same as diffusers calls it: batches of equal length."""

    def __call__(self, prompts: list[str], *, max_length: int, **options: object) -> SimpleNamespace:
        ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            row = torch.tensor(self.encode(prompt)[:max_length])
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def hash_word(word: str) -> int:
    """The same number in every process."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(word[:8]))


def transformer_pair(variant: str, dtype: torch.dtype, device: str) -> tuple[SanaTransformer, nn.Module]:
    """Our transformer of a variant without position table, and diffusers'."""
    row = VARIANTS[variant]
    config = {k: v for k, v in transformer_json(row.transformer, row.base_size).items() if k != "_class_name"}
    theirs = filled(SanaTransformer2DModel, config, dtype, device)
    ours = SanaTransformer(row.transformer, device="meta")
    ours.load_state_dict(to_transformer_names(theirs.state_dict()), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def autoencoder_pair(name: str, dtype: torch.dtype, device: str) -> tuple[DCAutoencoder, nn.Module]:
    """Our autoencoder of a family and diffusers'."""
    config = AUTOENCODERS[name]
    theirs = filled(AutoencoderDC, autoencoder_json(config), dtype, device)
    ours = DCAutoencoder(config, device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def gemma_pair(dtype: torch.dtype, device: str) -> tuple[GemmaTextEncoder, nn.Module]:
    """Our text encoder and transformers' network, with eager attention, its only implementation with soft-capping."""
    theirs = Gemma2Model._from_config(Gemma2Config(**gemma_json(GEMMA_2_2B)), attn_implementation="eager", dtype=dtype)
    randomise(theirs.to(device))
    for name, tensor in theirs.named_parameters():
        if "norm" in name:
            tensor.zero_()  # Gemma adds one
    ours = Gemma2(GEMMA_2_2B, device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return GemmaTextEncoder(ours.eval().requires_grad_(False), WordTokenizer()), theirs


def filled(kind: type, config: dict[str, object], dtype: torch.dtype, device: str) -> nn.Module:
    """A network of diffusers without buffers, which position tables would be."""
    with torch.device("meta"):
        network = kind.from_config(config)
    return randomise(network.to(dtype).to_empty(device=device))


@torch.no_grad()
def randomise(network: nn.Module) -> nn.Module:
    """Weights that keep activations near one."""
    for name, tensor in network.named_parameters():
        if tensor.ndim > 1 and "table" not in name:
            fill(tensor, tensor[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        else:
            fill(tensor, 0.2)
    return network.eval().requires_grad_(False)


def fill(tensor: Tensor, deviation: float) -> None:
    """Uniform numbers: several times quicker to draw than normal ones, and billions are needed."""
    tensor.uniform_(-(3**0.5) * deviation, 3**0.5 * deviation)
