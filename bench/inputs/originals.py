"""What inputs are made of: a whole model of a few channels, and what belongs to it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from sana.checkpoints.text_encoder import stored_companions
from sana.checkpoints.writing import write_pipeline
from sana.config import AUTOENCODERS, VARIANTS, AutoencoderConfig, GemmaConfig, StageConfig, TransformerIdentity
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import JsonTokenizer
from sana.training.tokenizer import train_tokenizer

from ..weights import randomise

TEXT_WIDTH = 32
WORDS = "a red circle left of blue square Enhanced prompt User: astronaut in the style"
GEMMA = GemmaConfig(
    vocab_size=400,
    hidden_size=TEXT_WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=16,
)


class Damaged(NamedTuple):
    path: Path
    part: str  # what it is read as; a key of `readers.READERS`


Kind = Callable[[Random, Path, Path], Damaged]  # of random numbers, an empty folder and the originals


def write_originals(folder: Path) -> None:
    """A whole model of a few channels in the layout of diffusers, a LoRA for it, a ControlNet, and single files of its parts."""
    row = replace(VARIANTS["sana-0.6b-1024px"].transformer, hidden_size=64, depth=2, cross_heads=2, ff_width=96)
    config = replace(row, text_width=TEXT_WIDTH, position_base=2)
    transformer = randomise(SanaTransformer(config), seed=0)
    autoencoder = randomise(DCAutoencoder(_autoencoder()), seed=1)
    train_tokenizer([WORDS], GEMMA.vocab_size, folder / "tokenizer.json")
    tokenizer = JsonTokenizer((folder / "tokenizer.json").read_bytes())
    encoder = GemmaTextEncoder(randomise(Gemma2(GEMMA), seed=2), tokenizer)
    identity = TransformerIdentity(config, "custom", 64, 3.0, "float32", "training")
    write_pipeline(
        folder / "model", transformer, autoencoder, encoder, tokenizer=folder / "tokenizer.json", identity=identity
    )
    save_file({**encoder.model.state_dict(), **stored_companions(tokenizer, GEMMA)}, folder / "encoder.safetensors")
    generator = torch.Generator().manual_seed(3)
    layers = [f"transformer.transformer_blocks.{i}.attn1.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v")]
    shapes = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    lora = {
        f"{layer}.{end}": torch.randn(shape, generator=generator) for layer in layers for end, shape in shapes.items()
    }
    save_file(lora, folder / "lora.safetensors")
    Image.new("RGB", (40, 40), "red").save(folder / "image.png")
    for path in folder.rglob("*.safetensors"):
        _sort_header(path)


def _sort_header(path: Path) -> None:
    """The library writes the entries of a header in an order of chance, and a seed has to damage the same byte every time."""
    content = path.read_bytes()
    header, numbers = split_safetensors(content)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(safetensors_bytes(text.ljust(len(content) - 8 - len(numbers)), numbers))


def safetensors_bytes(header: bytes, numbers: bytes, size: int | None = None) -> bytes:
    """A file of a header as it is. size: what the file tells of its length; None: the truth."""
    return struct.pack("<Q", len(header) if size is None else size) + header + numbers


def split_safetensors(content: bytes) -> tuple[dict[str, object], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _autoencoder() -> AutoencoderConfig:
    """The structure of SANA's at the smallest widths that its shortcuts and heads allow."""
    row, widths = AUTOENCODERS["dc-ae-f32c32-sana-1.1"], (32, 64, 64, 64, 128, 128)

    def shrunk(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(s, width=w, depth=1) for s, w in zip(stages, widths, strict=True))

    return replace(row, encoder=shrunk(row.encoder), decoder=shrunk(row.decoder))


def weights(originals: Path) -> list[tuple[Path, str]]:
    name = "diffusion_pytorch_model.safetensors"
    return [
        (originals / "model" / "transformer" / name, "transformer"),
        (originals / "model" / "vae" / name, "autoencoder"),
        (originals / "model" / "text_encoder" / "model.safetensors", "text_encoder"),
        (originals / "encoder.safetensors", "text_encoder"),
        (originals / "model" / "transformer" / name, "controlnet"),
    ]


def copy_beside(rng: Random, source: Path, folder: Path) -> None:
    """The configuration and tokenizer of a file, or not."""
    for beside in (source.parent / "config.json", source.parents[1] / "tokenizer" / "tokenizer.json"):
        if beside.is_file() and rng.random() < 0.8:
            shutil.copy(beside, folder)


def link_tree(source: Path, target: Path) -> None:
    """A folder whose files are those of another one, without a copy of their bytes."""
    shutil.copytree(source, target, copy_function=os.link)
