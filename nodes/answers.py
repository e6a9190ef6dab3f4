"""What the user interface asks while a graph is edited, before anything is loaded: how long a prompt is, what a model may be.

Models are named as the lists of the loaders name them, and nothing else is opened. No weight is read.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..sana.checkpoints.files import CheckpointError, read_tensors
from ..sana.checkpoints.text_encoder import read_tokenizer
from ..sana.checkpoints.transformer import identify_transformer, possible_sizes
from ..sana.config import TEXT_TOKENS
from ..sana.text.prompt import joined, window
from ..sana.text.styles import NO_STYLE
from ..sana.text.tokenizers import Tokenizer
from .host.foreign import in_host_formats
from .inputs import CUSTOM, NONE, OFFICIAL, instruction_text
from .model_files import AUTO, TEXT_ENCODER, load_part, model_names, model_path, part_names, part_path
from .styles import style_text, styled

SHOWN = 120  # characters of what is cut off
FRESH_SECONDS = 30  # for which it is known where a loader's text encoder is


def tokens(question: Mapping[str, object]) -> dict[str, object]:
    """How much of a prompt fits: {"used": tokens that count, "limit": 299, "lost": tokens cut off, "cut": their text,
    "style": the words of the style, with … for the text}.

    question: `loader` is the id of the node that CLIP comes from, with its `model` and `text_encoder`; `text`, `instruction`,
    `custom_instruction` and `style` are those of SANA prompt. `cut` is the beginning of what is cut off, as long as can be shown.
    Raises CheckpointError where the loader would, and ValueError for a question that no node asks.
    """
    loader, model, encoder = (_text(question, name) for name in ("loader", "model", "text_encoder"))
    instruction = _text(question, "instruction")
    if instruction not in (OFFICIAL, NONE, CUSTOM):
        raise ValueError(f"instruction is {OFFICIAL}, {NONE} or {CUSTOM}, not {instruction[:50]!r}")
    before = instruction_text(instruction, _text(question, "custom_instruction"))
    path = _encoder_path(loader, model, encoder, int(time.monotonic() // FRESH_SECONDS))
    style = _text(question, "style") or NO_STYLE
    counted = _count(_tokenizer(path, path.stat().st_mtime_ns), styled(_text(question, "text"), style), before)
    return {**counted, "style": style_text(style)}


def sizes(question: Mapping[str, object]) -> dict[str, object]:
    """{"sizes": px for which the `model` of Load SANA may have been released}; several where its file cannot tell.

    Raises CheckpointError for what is no SANA transformer, and for a name that the list does not have.
    """
    path = model_path(_entry(_text(question, "model"), model_names()))
    return {"sizes": possible_sizes(in_host_formats(read_tensors(path, "transformer")))}


def _text(question: Mapping[str, object], name: str) -> str:
    value = question.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is a text, not {type(value).__name__}")
    return value


def _count(tokenizer: Tokenizer, text: str, instruction: str | None) -> dict[str, object]:
    whole = joined(instruction, text)
    kept = window(len(tokenizer.encode(instruction)) if instruction else 0)
    starts = tokenizer.starts(whole)
    cut = whole[starts[kept.stop] :].strip() if kept.lost(len(starts)) else ""
    return {
        "used": kept.rows(len(starts)) - 1,
        "limit": TEXT_TOKENS - 1,
        "lost": kept.lost(len(starts)),
        "cut": cut if len(cut) <= SHOWN else cut[:SHOWN] + " …",
    }


@lru_cache(maxsize=16)
def _encoder_path(loader: str, model: str, text_encoder: str, period: int) -> Path:
    """Where the text encoder is that a loader with these inputs takes. period: of time, after which it is looked up again."""
    if loader == "SanaTextEncoderLoader":
        return part_path(TEXT_ENCODER.folder, _entry(text_encoder, part_names(TEXT_ENCODER.folder)))
    if loader != "SanaCheckpointLoader":
        raise ValueError(f"{loader[:50]!r} is no loader of SANA's text encoder")
    path = model_path(_entry(model, model_names()))
    chosen = text_encoder if text_encoder == AUTO else _entry(text_encoder, part_names(TEXT_ENCODER.folder))
    transformer = identify_transformer(in_host_formats(read_tensors(path, "transformer"))).config
    return load_part(TEXT_ENCODER, path, chosen, lambda found: read_tokenizer(found, transformer))[0]


def _entry(name: str, entries: list[str]) -> str:
    if name not in entries:
        raise CheckpointError(f"{name[:100]!r} is in no list of the loaders; choose another, or press R")
    return name


@lru_cache(maxsize=2)
def _tokenizer(path: Path, changed: int) -> Tokenizer:
    """changed: when the file was, in nanoseconds."""
    return read_tokenizer(path)
