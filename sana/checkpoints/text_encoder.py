"""Gemma-2 text encoders from files: a Hugging Face folder, or one safetensors file with the tokenizer in it."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GemmaConfig, TransformerConfig
from ..networks.adapters import Merge
from ..networks.operations import Operations
from ..reading import parse_json
from ..text.gemma import Gemma2
from ..text.text_encoder import GemmaTextEncoder
from ..text.tokenizers import BOS, EOS, PAD, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from .files import CheckpointError, Mapped, TensorFile, read_json, read_tensors
from .filling import NO_MERGES, fill
from .formats import COMFY_ATTENTION
from .gguf_container import is_gguf
from .gguf_files import read_gguf
from .header import stored_bytes
from .kinds import describe
from .names import dialect_prefix
from .numbers import LARGEST, count_parts
from .packing import with_packed

MARK = "layers.0.post_feedforward_layernorm.weight"
# Tensors of bytes in single-file encoders: the tokenizer (the first is the host's convention) and the configuration.
TOKENIZERS = {"spiece_model": SentencePieceTokenizer, "tokenizer_json": JsonTokenizer}
CONFIG = "gemma_config"
BUFFER = ".rotary_emb.inv_freq"  # which older files hold for every layer; it is computed
MODEL_TYPE = "gemma2"  # in a Hugging Face config.json
SOURCE = "Efficient-Large-Model/gemma-2-2b-it"
# In names. The tensors of Gemma-2-2b and Gemma-2-2b-it differ in their values alone.
INSTRUCTION_TUNED = re.compile(r"(?<![a-z])it(?![a-z])", re.IGNORECASE)
BASE = re.compile(r"gemma[-_. ]?2[-_. ]?2b", re.IGNORECASE)  # where the other is not

log = logging.getLogger(__name__)


class FoundTextEncoder(NamedTuple):
    """A text encoder in an opened file, recognised and renamed, but not yet built."""

    config: GemmaConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    name: str  # of the file, for errors


def check_text_encoder(
    text_encoder: GemmaConfig, transformer: TransformerConfig, name: str = "the text encoder"
) -> None:
    """Raises CheckpointError if the texts of an encoder are not as wide as a transformer takes them. name: for errors."""
    if text_encoder.hidden_size != transformer.text_width:
        raise CheckpointError(
            f"{name} is a Gemma-2 of width {text_encoder.hidden_size}, and the transformer takes texts of width "
            f"{transformer.text_width}; for a released model give {SOURCE}"
        )


def load_text_encoder(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    operations: type | ModuleType = Operations,
) -> GemmaTextEncoder:
    """Gemma-2 and its tokenizer from a Hugging Face folder, a pipeline folder, or a single safetensors or GGUF file.

    The tokenizer is `tokenizer.json` or `tokenizer.model` beside the weights or in a sibling folder `tokenizer`, or in the
    file: the tensor `spiece_model`, or the tokens of a GGUF. dtype: of the weights, float32 or bfloat16 (float16 overflows); None: as in the file.
    Raises CheckpointError if the file is no Gemma-2, lacks tensors, or has no tokenizer.
    """
    return build_text_encoder(find_text_encoder(read_text_encoder(path)), dtype, device, operations)


def read_text_encoder(path: Path | str, *, mapped: Mapped | None = None) -> TensorFile:
    """Open a file or folder for `find_text_encoder`. mapped: as for `read_tensors`. Raises as that and `read_gguf` do."""
    return read_gguf(path) if is_gguf(path) else read_tensors(path, "text_encoder", mapped=mapped)


def find_text_encoder(file: TensorFile) -> FoundTextEncoder:
    """The text encoder in a file, with its tokenizer. Raises as `load_text_encoder` does."""
    if is_gemma(file.tensors):
        file = with_packed(file)
    tensors = gemma_tensors(file)
    config = gemma_config(tensors, file)
    tokenizer = find_tokenizer(file, config)
    warn_of_base(file)
    return FoundTextEncoder(config, tokenizer, tensors, file.path.name)


def build_text_encoder(
    found: FoundTextEncoder,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    operations: type | ModuleType = Operations,
    merges: Mapping[str, Merge] = NO_MERGES,
) -> GemmaTextEncoder:
    """The network with its weights. merges: as for `fill`. Raises CheckpointError if it lacks tensors."""
    model = Gemma2(found.config, operations=operations, device="meta")
    return GemmaTextEncoder(fill(model, found.tensors, found.name, dtype, device, merges), found.tokenizer)


def is_gemma(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are a Gemma-2: later generations normalise queries as well."""
    prefix = dialect_prefix(names, MARK)
    return prefix is not None and f"{prefix}layers.0.self_attn.q_norm.weight" not in names


def gemma_tensors(file: TensorFile) -> dict[str, Tensor]:
    """The network in a file, in the names of transformers' `Gemma2Model`. Raises CheckpointError if there is none."""
    prefix = dialect_prefix(file.tensors, MARK)
    if not is_gemma(file.tensors):
        kind = describe(file.tensors) if prefix is None else "a Gemma of another generation"
        raise CheckpointError(f"{file.path.name} is {kind}; give a Gemma-2-2b-it, such as {SOURCE}")
    found = {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}
    used = {name: tensor for name, tensor in found.items() if name.startswith(("layers.", "embed_tokens.", "norm."))}
    return {name: tensor for name, tensor in used.items() if not name.endswith((BUFFER, COMFY_ATTENTION))}


def gemma_config(tensors: dict[str, Tensor], file: TensorFile) -> GemmaConfig:
    """The configuration beside or in the file, or that of Gemma-2-2b. Raises CheckpointError for other sizes."""
    stored = stored_bytes(file, CONFIG)
    if stored is not None:
        return _checked(_from_json(_loaded(stored, file), file.path.name), tensors, file.path.name)
    if file.config.get("model_type") == MODEL_TYPE:
        return _checked(_from_json(file.config, file.path.name), tensors, file.path.name)
    norm = tensors.get("norm.weight")
    if norm is None or norm.ndim != 1:
        raise CheckpointError(f"{file.path.name} lacks norm.weight, or it is no row; the download may be incomplete")
    width = norm.shape[0]
    if width == GemmaConfig.hidden_size:
        return GemmaConfig()
    raise CheckpointError(f"{file.path.name} has width {width}, not that of Gemma-2-2b; put its config.json beside it")


def _checked(config: GemmaConfig, tensors: Mapping[str, Tensor], name: str) -> GemmaConfig:
    """Raises CheckpointError for a number of layers that the tensors do not have, and for heads that share none."""
    layers = count_parts(tensors, "layers", name)
    if config.num_hidden_layers != layers:
        raise CheckpointError(
            f"{name} has {layers} layers, and its configuration tells of {config.num_hidden_layers}; take its original config.json"
        )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{name} has {config.num_attention_heads} heads of {config.head_dim} that share {config.num_key_value_heads} keys, "
            "which no Gemma-2 has; take its original config.json"
        )
    return config


def _loaded(stored: bytes, file: TensorFile) -> object:
    try:
        return parse_json(stored)
    except ValueError as error:
        raise CheckpointError(
            f"{file.path.name}: its tensor {CONFIG} is no JSON ({error}); download it again"
        ) from error


def gemma_json(config: GemmaConfig) -> dict[str, object]:
    """The configuration of transformers' Gemma2Model."""
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    return {"architectures": ["Gemma2Model"], "model_type": MODEL_TYPE, **asdict(config), **tokens}


def _from_json(stored: object, name: str) -> GemmaConfig:
    """Raises CheckpointError for values that no network has. name: of the file, for errors.

    Newer files have the base of the rotary positions in a dictionary of their own.
    """
    values = dict(stored) if isinstance(stored, Mapping) else {}
    rotary = values.get("rope_parameters")
    values.update(rotary if isinstance(rotary, Mapping) else {})
    found = {field.name: values[field.name] for field in fields(GemmaConfig) if field.name in values}
    for key, value in found.items():
        whole = isinstance(getattr(GemmaConfig, key), int) and key != "query_pre_attn_scalar"
        if type(value) is not int and (whole or type(value) is not float) or not 0 < value <= LARGEST:
            raise CheckpointError(
                f"{name} has {key} {str(value)[:50]!r}, which no Gemma-2 has; take its original config.json"
            )
    return GemmaConfig(**found)


def find_tokenizer(file: TensorFile, config: GemmaConfig) -> Tokenizer:
    """The tokenizer in or beside an encoder file. Raises CheckpointError if there is none, or that of a larger vocabulary."""
    for name, kind in TOKENIZERS.items():
        stored = stored_bytes(file, name)
        if stored is not None:
            return _tokenizer(kind, stored, f"{name} of {file.path.name}", config)
    folder = file.path if file.path.is_dir() else file.path.parent
    for place in (folder, folder.parent / "tokenizer"):
        for name, kind in (("tokenizer.json", JsonTokenizer), ("tokenizer.model", SentencePieceTokenizer)):
            if (place / name).is_file():
                return _tokenizer(kind, (place / name).read_bytes(), str(place / name), config)
    raise CheckpointError(
        f"{file.path.name} has no tokenizer; put tokenizer.json or tokenizer.model of {SOURCE} beside it"
    )


def read_tokenizer(path: Path | str, transformer: TransformerConfig | None = None) -> Tokenizer:
    """The tokenizer of the text encoder in a file or folder, without the weights of either.

    transformer: for which its texts must have the right width; None: for any. Raises as `load_text_encoder` does.
    """
    file = read_text_encoder(path)
    config = gemma_config(gemma_tensors(file), file)
    if transformer is not None:
        check_text_encoder(config, transformer, file.path.name)
    return find_tokenizer(file, config)


def warn_of_base(file: TensorFile) -> None:
    """Log a warning if a text encoder is known to be the base model: by its name, where no chat template says otherwise."""
    folder = file.path if file.path.is_dir() else file.path.parent
    for place in (folder, folder.parent / "tokenizer"):  # of -it alone
        if (place / "chat_template.jinja").exists() or "chat_template" in read_json(place / "tokenizer_config.json"):
            return
    told = file.config.get("_name_or_path")
    names = (file.path.name, told if isinstance(told, str) else "")
    if any(map(BASE.search, names)) and not any(map(INSTRUCTION_TUNED.search, names)):
        log.warning(
            "%s is named like the base Gemma-2-2b; SANA was trained with Gemma-2-2b-it, and with the base model pictures follow "
            "their prompts less, and prompts are enhanced badly; use %s",
            file.path.name,
            SOURCE,
        )


def _tokenizer(
    kind: type[JsonTokenizer | SentencePieceTokenizer], source: bytes, name: str, config: GemmaConfig
) -> Tokenizer:
    try:
        found = kind(source)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} is no readable tokenizer of a Gemma-2 ({error}); use that of {SOURCE}"
        ) from error
    if found.size > config.vocab_size:
        raise CheckpointError(
            f"{name} has {found.size} tokens and the text encoder only {config.vocab_size}; use the tokenizer of {SOURCE}"
        )
    return found


def stored_companions(tokenizer: Tokenizer, config: GemmaConfig) -> dict[str, Tensor]:
    """A tokenizer and a configuration as tensors of bytes, for files that hold nothing else."""
    name = next(name for name, kind in TOKENIZERS.items() if isinstance(tokenizer, kind))
    parts = {name: tokenizer.source, CONFIG: json.dumps(gemma_json(config)).encode()}
    return {name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in parts.items()}
