"""Gemma as a GGUF file, written by the gguf package in the way of llama.cpp's convert_hf_to_gguf.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from sana.config import GemmaConfig
from tests.sana.models import GEMMA, tokenizer_model

Kind = gguf.GGMLQuantizationType
# llama.cpp's names, by gguf's own table.
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 99)
USER_DEFINED = ("\n",)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: Callable[[str], Kind],
    config: GemmaConfig = GEMMA,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "gemma2",
    marks: Sequence[str] = (),
) -> Path:
    """tensors: in the names of Hugging Face. kind: what a matrix is packed in, by its name; norms are float32.

    change: is called before anything is written. marks: tokens of the vocabulary that are no text.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    add_tokenizer(writer, marks)
    change(writer)
    for name, tensor in tensors.items():
        stored = NAMES.get_name(f"model.{name.removesuffix('.weight')}") + ".weight"
        if tensor.ndim == 1:
            writer.add_tensor(stored, (tensor.float() + 1).numpy())
        else:
            writer.add_tensor(stored, packed(tensor, kind(name)), raw_dtype=kind(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(tensor: Tensor, kind: Kind) -> np.ndarray:
    """Random blocks with small scales, for kinds that the package unpacks but does not pack."""
    try:
        return gguf.quants.quantize(tensor.float().numpy(), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(tensor.numel()).integers(0, 256, (tensor.numel() // block, size), dtype=np.uint8)
        for place in SCALES[kind]:
            blocks[:, place : place + 2] = np.frombuffer(np.float16(0.002).tobytes(), dtype=np.uint8)
        return blocks.reshape(tensor.shape[0], -1)


# Where the float16 of a block stand, ggml/src/ggml-common.h.
SCALES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}


def add_tokenizer(writer: gguf.GGUFWriter, marks: Sequence[str]) -> None:
    """As `_create_vocab_sentencepiece` does: tokens of the user have spaces in the place of their mark."""
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(tokenizer_model(*marks))
    tokens, kinds = [], []
    for i in range(model.GetPieceSize()):
        token = model.IdToPiece(i)
        kind = gguf.TokenType.NORMAL
        if model.IsUnknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif model.IsControl(i) or token in marks:
            kind = gguf.TokenType.CONTROL
        elif model.IsByte(i):
            kind = gguf.TokenType.BYTE
        elif token in USER_DEFINED:
            kind, token = gguf.TokenType.USER_DEFINED, token.replace("\u2581", " ")
        tokens.append(token)
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([model.GetScore(i) for i in range(model.GetPieceSize())])
    writer.add_token_types(kinds)
    for add, token in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2)):
        add(token)
    writer.add_unk_token_id(3)
