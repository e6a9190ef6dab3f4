"""Gemma-2 out of GGUF files, by the gguf package: tensors in the names of Hugging Face, configuration and tokenizer.

The names are those of llama.cpp (gguf/tensor_mapping.py), which stores the weights of norms with one added.
"""

import math
import re
import struct
from collections import UserDict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..networks.packed import PackedWeight, Parts
from .files import CheckpointError, TensorFile
from .gguf_container import Container, StoredTensor, read_container
from .numbers import LARGEST

ARCHITECTURE = "gemma2"
TOKENIZER = "spiece_model"  # the tensor of bytes that other readers know
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NAME = re.compile(r"(?:blk\.([0-9]+)\.)?(\w+)\.(\w+)")  # the number of a block, a part, and weight or bias
# Of a config.json, by their keys behind "gemma2.".
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What the tokenizer's fields list, behind "tokenizer.ggml.".
TOKENS = {"tokens": str, "scores": float, "token_type": int}
# Kinds of tokens, the same numbers in GGUF and in sentencepiece.
KINDS = range(1, 7)
CONTROL, USER_DEFINED = 3, 4
ROLES = ("unknown", "bos", "eos", "padding")  # of tokens, in the order in which sentencepiece numbers them
VARINT, BYTES, FOUR_BYTES = 0, 2, 5  # how a protobuf stores the value of a field


def read_gguf(path: Path | str) -> TensorFile:
    """A Gemma-2 with packed weights, its tokenizer as a tensor of bytes, and what a config.json would say.

    Raises CheckpointError for other models, for blocks that the package does not unpack, and where it is not installed.
    """
    path = Path(path)
    gguf = _package(path)
    container = read_container(path)
    fields = _Fields(path.name, container.fields)
    found = fields["general.architecture"]
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"{path.name} is a GGUF of {str(found)[:50]}; give one of gemma-2-2b-it, or a safetensors file"
        )
    config = {name: fields[f"{ARCHITECTURE}.{key}"] for name, key in FIELDS.items()}
    tensors = {_name(tensor.name): _tensor(gguf, tensor, container, path.name) for tensor in container.tensors}
    embedding = tensors.get("embed_tokens.weight")
    config["vocab_size"] = embedding.shape[0] if embedding is not None else 0
    config["query_pre_attn_scalar"] = config["head_dim"]  # as for 2b and 9b; the file does not say
    tensors[TOKENIZER] = torch.frombuffer(bytearray(_tokenizer(fields)), dtype=torch.uint8)
    return TensorFile(path, tensors, config={"model_type": ARCHITECTURE, **config})


def _package(path: Path) -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} is GGUF, which needs the package gguf; install it by `pip install gguf`, or take a safetensors file"
        ) from error
    return gguf


class _Fields(UserDict[str, object]):
    """The fields of a file, whose name stands in the error for one that is missing."""

    def __init__(self, file: str, fields: Mapping[str, object]) -> None:
        super().__init__(fields)
        self.file = file

    def __missing__(self, key: str) -> object:
        raise CheckpointError(f"{self.file} lacks {key}; download it again")


def _name(name: str) -> str:
    """In the names of Hugging Face; others keep their own."""
    found = NAME.fullmatch(name)
    block, part, leaf = found.groups() if found else (None, "", "")
    if block is None:
        return f"{OUTSIDE[part]}.{leaf}" if part in OUTSIDE else name
    return f"layers.{block}.{IN_BLOCK[part]}.{leaf}" if part in IN_BLOCK else name


def _tensor(gguf: ModuleType, stored: StoredTensor, container: Container, file: str) -> Tensor | PackedWeight:
    try:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise _not_unpacked(stored, str(stored.kind), file) from error
    row = stored.shape[-1] // block * size
    end = stored.start + math.prod(stored.shape[:-1]) * row
    if end > len(container.content) or stored.shape[-1] % block:
        raise CheckpointError(
            f"{file} has {len(container.content)} bytes, and {stored.name} of shape {stored.shape} in {kind.name} ends at {end}; "
            "the download may be incomplete"
        )
    numbers = torch.from_numpy(container.content[stored.start : end]).view(*stored.shape[:-1], row)
    if kind.name in PLAIN:
        plain = numbers.view(PLAIN[kind.name])
        return plain.float() - 1 if stored.name.endswith("_norm.weight") else plain
    unpack = partial(_unpacked, gguf.quants, kind)
    try:
        unpack({"packed": numbers[:1]})
    except NotImplementedError as error:
        raise _not_unpacked(stored, kind.name, file) from error
    return PackedWeight(kind.name, unpack, {"packed": numbers}, stored.shape)


def _not_unpacked(stored: StoredTensor, kind: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"{file} has {stored.name} in {kind}, which the package gguf does not unpack; take a file in Q8_0 or Q4_K_M"
    )


def _unpacked(quants: ModuleType, kind: object, parts: Parts) -> Tensor:
    """By NumPy, so on the CPU, and from there to where the parts are."""
    packed = parts["packed"]
    with np.errstate(all="ignore"):  # a damaged scale makes numbers that are not finite, which NumPy would warn of
        return torch.from_numpy(quants.dequantize(packed.cpu().numpy(), kind)).to(packed.device)


def _tokenizer(fields: _Fields) -> bytes:
    """The tokens as the file of sentencepiece that they were taken from (sentencepiece_model.proto).

    llama.cpp writes a space for the mark of one. Marks of turns and the like are control tokens there; as tokens of the
    user they are found in a text, as Hugging Face's tokenizer finds them.
    """
    if fields["tokenizer.ggml.model"] != "llama":
        raise CheckpointError(
            f"{fields.file} has a tokenizer that is not of sentencepiece, as Gemma's is; take another file"
        )
    tokens, scores, kinds = (_listed(fields, f"tokenizer.ggml.{key}", kind) for key, kind in TOKENS.items())
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(f"{fields.file} has {len(tokens)} tokens with {len(scores)} scores; download it again")
    wrong = next((kind for kind in kinds if kind not in KINDS), None)
    if wrong is not None:
        raise CheckpointError(
            f"{fields.file} has a token of type {wrong}, which sentencepiece has not; download it again"
        )
    model = b"".join(_message(1, _piece(*piece)) for piece in zip(tokens, scores, kinds, strict=True))
    bpe, fallback = _number(3, 2), _number(35, 1)
    marks = [_number(40 + i, _token_id(fields, role, len(tokens))) for i, role in enumerate(ROLES)]
    plain = [_message(1, b"identity"), _number(3, 0), _number(4, 0), _number(5, 1)]
    return model + _message(2, b"".join([bpe, fallback, *marks])) + _message(3, b"".join(plain))


def _listed(fields: _Fields, key: str, kind: type) -> list[object]:
    """A list of one type in a field. Raises CheckpointError for anything else, and for more than any vocabulary has."""
    found = fields[key]
    if not isinstance(found, list) or len(found) > LARGEST or any(type(value) is not kind for value in found):
        raise CheckpointError(
            f"{fields.file} has {key} that are no list of at most {LARGEST} {kind.__name__}; download it again"
        )
    return found


def _token_id(fields: _Fields, role: str, count: int) -> int:
    key = f"tokenizer.ggml.{role}_token_id"
    found = fields[key]
    if type(found) is not int or not 0 <= found < count:
        raise CheckpointError(f"{fields.file} has {key} {str(found)[:50]!r} of {count} tokens; download it again")
    return found


def _piece(token: str, score: float, kind: int) -> bytes:
    kind = USER_DEFINED if kind == CONTROL else kind
    text = token.replace(" ", "\u2581").encode()
    return _message(1, text) + bytes(_varint(2 << 3 | FOUR_BYTES)) + struct.pack("<f", score) + _number(3, kind)


def _message(field: int, content: bytes) -> bytes:
    return bytes([*_varint(field << 3 | BYTES), *_varint(len(content))]) + content


def _number(field: int, value: int) -> bytes:
    return bytes([*_varint(field << 3 | VARINT), *_varint(value)])


def _varint(value: int) -> Iterator[int]:
    """Seven bits a byte, the lowest first; all but the last byte are marked."""
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
