"""What a file tells of a network beside its tensors: our entry in a safetensors header, and tensors of bytes."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from ..config import AutoencoderConfig, TransformerConfig, TransformerIdentity
from ..reading import parse_json
from .files import CheckpointError, TensorFile
from .modelspec import AUTOENCODER, modelspec, transformer_modelspec
from .names import HEADER_TENSOR, dialect_prefix

HEADER = "sana"  # key of our entry in a safetensors header: JSON of what the tensors cannot tell

Filled = TypeVar("Filled")


def transformer_header(identity: TransformerIdentity) -> dict[str, str]:
    """The entries for a safetensors header that make a transformer tell what its tensors cannot, and programs list it."""
    told = {name: value for name, value in asdict(identity).items() if name != "origin"}
    return {HEADER: json.dumps(told), **transformer_modelspec(identity)}


def autoencoder_header(config: AutoencoderConfig, title: str) -> dict[str, str]:
    return {HEADER: json.dumps({"latent_scale": config.latent_scale}), **modelspec(AUTOENCODER, title)}


def header_tensor(identity: TransformerIdentity) -> Tensor:
    """The same as a tensor of bytes, for hosts that save tensors but no header."""
    return torch.frombuffer(bytearray(transformer_header(identity)[HEADER].encode()), dtype=torch.uint8)


def read_header(file: TensorFile) -> dict[str, object]:
    """What `transformer_header`, `autoencoder_header` or `header_tensor` wrote; {} if none did."""
    stored = file.metadata.get(HEADER) or stored_bytes(file, HEADER_TENSOR) or b"{}"
    try:
        found = parse_json(stored)
    except ValueError:  # an entry of somebody else
        return {}
    return found if isinstance(found, dict) else {}


def told_identity(header: Mapping[str, object]) -> TransformerIdentity | None:
    """What a header tells of a transformer; None: it is none of ours."""
    config = _filled(TransformerConfig, header.get("config"))
    return _filled(TransformerIdentity, {**header, "config": config, "origin": "its header"})


def _filled(kind: type[Filled], values: object) -> Filled | None:
    """A dataclass of the values that are its fields, since a later version may have written more.

    None: a value is of another type than its field, or one is missing that has no default.
    """
    if not isinstance(values, Mapping):
        return None
    types = get_type_hints(kind)
    known = {name: values[name] for name in types if name in values}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    fit = all(_is_a(value, types[name]) for name, value in known.items())
    return kind(**known) if fit and needed <= known.keys() else None


def _is_a(value: object, kind: type) -> bool:
    """Whether a value has a type. An integer is a float too: JSON writes numbers without a fraction so. A truth is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and (kind is float or float in get_args(kind)))


def stored_bytes(file: TensorFile, name: str) -> bytes | None:
    """What a tensor of bytes holds, under whatever prefix; None: there is none.

    Scripts that cast a whole checkpoint cast it too, which 16 bits bear. Raises CheckpointError for less.
    """
    prefix = dialect_prefix(file.tensors, name)
    if prefix is None:
        return None
    tensor = file.tensors[prefix + name]
    if tensor.dtype != torch.uint8 and tensor.dtype.itemsize == 1:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file.path.name} holds {prefix}{name}, a tensor of bytes, in {dtype}, which rounds them; cast only the weights "
            "of the original file"
        )
    return tensor.to("cpu", torch.uint8).contiguous().numpy().tobytes()
