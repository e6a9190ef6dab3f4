"""The parts of a model from files, each in the numbers that it computes with."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoints.autoencoder import load_autoencoder
from .checkpoints.controlnet import load_controlnet
from .checkpoints.files import CheckpointError, TensorFile, read_tensors
from .checkpoints.filling import placed_bytes
from .checkpoints.lora import read_merges
from .checkpoints.names import is_autoencoder
from .checkpoints.text_encoder import build_text_encoder, find_text_encoder, is_gemma, read_text_encoder
from .checkpoints.transformer import build_transformer, find_transformer
from .config import TransformerIdentity
from .needs import CONTROLNET, DECODER, ENCODER, TEXT_ENCODER, TRANSFORMER
from .networks.autoencoder import DCAutoencoder
from .networks.controlnet import SanaControlNet
from .networks.devices import computes_bfloat16
from .networks.packed_layers import HAS_INT8_PRODUCTS, multiply_in_int8
from .networks.transformer import SanaTransformer
from .offloading import CPU, Offloader
from .text.text_encoder import GemmaTextEncoder

IN_INT8 = "in_int8 (in the shell --in-int8)"
MODELS = {"demo": Path(__file__).parent / "demo" / "checkpoint"}  # names that stand for a folder

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a pipeline is made of, in the order in which it takes them."""

    transformer: SanaTransformer
    autoencoder: DCAutoencoder
    text_encoder: GemmaTextEncoder
    identity: TransformerIdentity
    controlnet: SanaControlNet | None


def load_parts(
    model: Path | str,
    offloader: Offloader,
    *,
    autoencoder: Path | str | None = None,
    text_encoder: Path | str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    loras: Sequence[tuple[Path | str, float]] = (),
    control: Path | str | None = None,
) -> Parts:
    """The parts at the home of an offloader, which takes them over. The others: see `SanaPipeline.load`, which raises the same."""
    model = model_path(model)
    autoencoder, text_encoder = (part and model_path(part) for part in (autoencoder, text_encoder))
    file = read_tensors(model, "transformer")
    found = find_transformer(file, variant)
    check_parts(model, file, autoencoder, text_encoder)
    text = find_text_encoder(read_text_encoder(text_encoder or model))
    merges, text_merges = read_merges(loras, found.identity.config, text.config)
    own, safe = default_dtypes(found.identity.dtype, offloader.device)
    own, others = dtype or own, safe if dtype in (None, torch.float16) else dtype
    if offloader.is_active:
        beside = [placed_bytes(read_tensors(autoencoder or model, "vae").tensors, others)]
        beside += [] if control is None else [placed_bytes(read_tensors(control, "controlnet").tensors, own)]
        offloader.choose_home(placed_bytes(found.tensors, own) + placed_bytes(text.tensors, others) + sum(beside))
    home = offloader.home
    parts = Parts(
        build_transformer(found, own, home, merges=merges),
        load_autoencoder(autoencoder or model, others, home),
        build_text_encoder(text, others, home, merges=text_merges),
        found.identity,
        None if control is None else load_controlnet(control, own, home),
    )
    _hand_over(parts, offloader)
    return parts


def load_writer(
    model: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    loras: Sequence[tuple[Path | str, float]] = (),
) -> GemmaTextEncoder:
    """The text encoder of a model, or in a file or folder of its own, and nothing else.

    dtype: None: float32 on a CPU, else bfloat16 where the device computes with it. loras: of which the part for the text
    encoder counts. Raises CheckpointError, ValueError and FileNotFoundError, as `SanaPipeline.load` does.
    """
    text = find_text_encoder(read_text_encoder(model_path(model)))
    _, merges = read_merges(loras, None, text.config)
    return build_text_encoder(text, dtype or default_dtypes("bfloat16", device)[1], device, merges=merges)


def check_in_int8(device: torch.device, compiled: bool = False) -> None:
    """Raises ValueError where no transformer can be multiplied in 8 bits; see in_int8 of `SanaPipeline.load`."""
    if device.type != "cpu":
        raise ValueError(f"{IN_INT8} is for a CPU, and the device is {device}; leave it out")
    if compiled:
        raise ValueError(f"{IN_INT8} and compiled (--compile) exclude each other; leave one out")
    if not HAS_INT8_PRODUCTS:
        raise ValueError(
            f"{IN_INT8} needs a processor that multiplies 8 bits (AVX512 VNNI), which this one does not; leave it out"
        )


def multiply_in_8_bits(transformer: SanaTransformer, model: Path | str) -> None:
    """See in_int8 of `SanaPipeline.load`. Raises ValueError for a transformer without a layer for it, and tells of LoRAs."""
    there, changed = multiply_in_int8(transformer)
    if not there and not changed:
        raise ValueError(
            f"{IN_INT8} needs a transformer in int8, and {model} is none; write one with sana convert --quantize int8"
        )
    if not there:
        raise ValueError(
            f"{IN_INT8} changes nothing here, since LoRAs change all {changed} layers of {model} that are in int8, and what is "
            "changed is multiplied unpacked; leave it out, or merge the LoRAs (sana convert --lora) and quantise the merged file"
        )
    if changed:
        log.warning(
            "LoRAs change %d of the %d layers in int8; these are unpacked, and only the others multiplied in 8 bits.",
            changed,
            there + changed,
        )


def _hand_over(parts: Parts, offloader: Offloader) -> None:
    gemma = parts.text_encoder.model
    if offloader.is_active:
        gemma.embedding_device = CPU  # a look-up needs no GPU, and the table is a fifth of all weights
        gemma.embed_tokens.to(CPU)
    offloader.add(TEXT_ENCODER, gemma.layers, gemma.norm, on_leave=parts.text_encoder.forget)
    offloader.add(ENCODER, parts.autoencoder.encoder)
    offloader.add(TRANSFORMER, parts.transformer)
    if parts.controlnet is not None:
        offloader.add(CONTROLNET, parts.controlnet)
    offloader.add(DECODER, parts.autoencoder.decoder)


def default_dtypes(released: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of a transformer released in such a dtype, and of the other parts, which float16 breaks; see `SanaPipeline.load`."""
    if device.type == "cpu":
        return torch.float32, torch.float32
    own, others = getattr(torch, released), torch.bfloat16
    if computes_bfloat16(device):
        return own, others
    return (torch.float32 if own == torch.bfloat16 else own), torch.float32


def model_path(model: Path | str) -> Path:
    """Where a model is that is given by a name of MODELS or by its path."""
    return MODELS.get(str(model), Path(model))


def check_parts(model: Path, file: TensorFile, autoencoder: Path | str | None, text_encoder: Path | str | None) -> None:
    """Raises CheckpointError if a part is neither given nor comes with the transformer, at `model`."""
    parts = {
        "an autoencoder": autoencoder or (model / "vae").is_dir() or is_autoencoder(file.tensors),
        "a text encoder": text_encoder or (model / "text_encoder").is_dir() or is_gemma(file.tensors),
    }
    missing = " and ".join(name for name, there in parts.items() if not there)
    if missing:
        raise CheckpointError(f"{model} is the transformer alone; give {missing} as well")
