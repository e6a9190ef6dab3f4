"""TAESANA's decoder from a file."""

from pathlib import Path

import torch

from ..networks.tiny_decoder import TinyDecoder
from .files import CheckpointError, read_tensors
from .filling import fill
from .kinds import describe

SOURCE = "taesana_decoder.pth of https://github.com/madebyollin/taesd"


def load_tiny_decoder(path: Path, dtype: torch.dtype, device: torch.device | str) -> TinyDecoder:
    """Raises CheckpointError if the file holds none."""
    file = read_tensors(path)
    network = TinyDecoder(dtype=dtype, device="meta")
    expected = network.state_dict()
    found = file.tensors.get("1.weight")  # the layer that takes the latent, which tells the decoders of a family apart
    if found is None or expected["1.weight"].shape != found.shape:
        is_other = expected.keys() & file.tensors.keys()
        kind = "a small autoencoder for another model" if is_other else describe(file.tensors)
        raise CheckpointError(f"{path.name} is {kind}, and previews of SANA take {SOURCE}")
    return fill(network, file.tensors, path.name, dtype, device)
