"""Tokenizers out of the bytes of a file: texts to the token ids of a Gemma-2.

A file of a tokenizers library may hold patterns that take for ever to match and rules that make a text a million times longer.
Gemma-2 needs neither, so everything but a vocabulary with its merges is compared with what Gemma-2 has, before a library reads it.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

PAD, EOS, BOS = 0, 1, 2  # token ids of every Gemma-2 vocabulary
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"  # of a talk; every Gemma-2 has them
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token for one byte of a character that has none

# Parts of a `tokenizer.json`, as transformers writes them for every Gemma: "▁" stands for a space.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
# Settings of its model that Gemma-2 leaves empty.
UNSET = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


# Numbers of fields in sentencepiece_model.proto, and kinds of fields in protobuf's encoding.
SPECS, CHARACTER_MAP = (3, 5), 2  # normalizer_spec and denormalizer_spec; precompiled_charsmap in either
VARINT, BYTES, FIXED_SIZES = 0, 2, {1: 8, 5: 4}


class Tokenizer(Protocol):
    source: bytes  # of the file it was made from
    size: int  # above the largest id of its vocabulary, without tokens that a fine-tune added for other uses

    def encode(self, text: str) -> list[int]:
        """Token ids, the beginning-of-sequence token first. Raises ValueError for what is no text."""

    def starts(self, text: str) -> list[int]:
        """Where each token of `encode` begins in the text, in characters. Raises ValueError for what is no text."""

    def find(self, piece: str) -> int | None:
        """The id of a piece of the vocabulary; None: it has no such piece."""

    def content(self, token: int) -> bytes:
        """What a token stands for in a text, in UTF-8: nothing for marks, such as the beginning of a sequence."""


def written(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, as they come. A character that is made of several tokens comes whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.content(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _content(piece: str) -> bytes:
    """Of a piece that is no mark."""
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """The tokenizers library raises bare exceptions, and panics in Rust: what that raises is no Exception, and ends a thread."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(
            f"the tokenizers library broke down ({error}); use the tokenizer.json of the original"
        ) from error


class JsonTokenizer:
    """The content of a `tokenizer.json`, by the tokenizers library. Raises ValueError for what is no Gemma-2's."""

    def __init__(self, source: bytes) -> None:
        from tokenizers import Tokenizer as Backend

        self.source = source
        checked, self.size = _checked(source)
        with _as_value_errors():
            self.backend = Backend.from_str(checked)
        marks = (token for token, added in self.backend.get_added_tokens_decoder().items() if added.special)
        self._marks = {
            PAD,
            EOS,
            BOS,
            *(token for token in marks if not BYTE.fullmatch(self.backend.id_to_token(token))),
        }

    def encode(self, text: str) -> list[int]:
        check_text(text)
        with _as_value_errors():
            return [BOS, *self.backend.encode(text, add_special_tokens=False).ids]

    def starts(self, text: str) -> list[int]:
        check_text(text)
        with _as_value_errors():
            return [0, *(start for start, _ in self.backend.encode(text, add_special_tokens=False).offsets)]

    def find(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def content(self, token: int) -> bytes:
        piece = None if token in self._marks else self.backend.id_to_token(token)
        return _content(piece or "")


def check_text(text: str, name: str = "prompt") -> None:
    """Raises ValueError for halves of characters, which a terminal or a JSON of other bytes leaves in a text of this name."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} is no text in UTF-8 from its character {error.start + 1} on; type it again"
        ) from error


def _checked(source: bytes) -> tuple[str, int]:
    """A `tokenizer.json` with the parts that are used, and the `size` of its vocabulary.

    Other parts are left out, such as the truncation that transformers stores. Raises ValueError for a part that no Gemma-2 has.
    """
    content = json.loads(source)
    content = content if isinstance(content, dict) else {}
    model, splitter = content.get("model"), content.get("pre_tokenizer")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not vocabulary or not isinstance(vocabulary, dict) or any(type(row) is not int for row in vocabulary.values()):
        raise ValueError("it has no vocabulary")
    if model.get("type") != "BPE" or any(model.get(key) for key in UNSET):
        raise ValueError("its model is not the plain BPE of a Gemma-2")
    if content.get("normalizer") != NORMALIZER:
        raise ValueError("its normalizer is not a Gemma-2's, which puts ▁ for spaces")
    if splitter is not None and not _splits_at_a_text(splitter):
        raise ValueError("its pre_tokenizer does more than a Gemma-2's, which splits at a fixed text")
    kept = {key: content.get(key) for key in ("version", "added_tokens", "normalizer", "pre_tokenizer", "model")}
    return json.dumps({**kept, "decoder": DECODER}, ensure_ascii=False), max(vocabulary.values()) + 1


def _splits_at_a_text(part: object) -> bool:
    """Whether a part is a `Split` whose pattern is a text, not an expression."""
    pattern = part.get("pattern") if isinstance(part, dict) and part.get("type") == "Split" else None
    return isinstance(pattern, dict) and pattern.keys() == {"String"}


class SentencePieceTokenizer:
    """The content of a `tokenizer.model`, or of the `spiece_model` tensor of a single-file encoder, by sentencepiece.

    Raises ValueError for what is no Gemma-2's, and RuntimeError as sentencepiece does.
    """

    def __init__(self, source: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.source = source
        for field, spec in _fields(source):
            if field in SPECS and any(number == CHARACTER_MAP and found for number, found in _fields(spec)):
                raise ValueError("it replaces characters, which a Gemma-2's does not")
        self.backend = SentencePieceProcessor()
        self.backend.LoadFromSerializedProto(source)
        self.size = self.backend.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        check_text(text)
        return [BOS, *self.backend.encode(text)]

    def starts(self, text: str) -> list[int]:
        check_text(text)
        found, at, letter = [0], 0, b""
        pieces = self.backend.encode(text, out_type=str)  # whose places are in bytes or in characters by version
        for piece in pieces:
            found.append(at)
            byte = BYTE.fullmatch(piece)
            letter = letter + bytes.fromhex(byte[1]) if byte else b""
            if not byte:
                at += len(piece)
            elif len(letter) == _utf8_length(letter[0]):
                at, letter = at + 1, b""
        return found

    def find(self, piece: str) -> int | None:
        found = self.backend.PieceToId(piece)  # of the unknown piece, where there is none
        return found if self.backend.IdToPiece(found) == piece else None

    def content(self, token: int) -> bytes:
        if (
            token >= self.size
            or token in (PAD, EOS, BOS)
            or self.backend.IsControl(token)
            or self.backend.IsUnknown(token)
        ):
            return b""
        piece = self.backend.IdToPiece(token)
        return b"" if piece in (START_OF_TURN, END_OF_TURN) else _content(piece)


def _utf8_length(first: int) -> int:
    """Bytes of a letter in UTF-8, by the first of them."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of those fields of a protobuf message that hold bytes. Raises ValueError where it is damaged.

    Source: protobuf.dev/programming-guides/encoding.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == VARINT:
            _, at = _varint(message, at)
        elif key & 7 == BYTES:
            size, at = _varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size
        elif key & 7 in FIXED_SIZES:
            at += FIXED_SIZES[key & 7]
        else:
            raise ValueError(f"its byte {at} is damaged")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and the place behind it. Raises ValueError if the message ends in it."""
    number = 0
    for shift, byte in enumerate(message[at : at + 10]):
        number |= (byte & 127) << 7 * shift
        if byte < 128:
            return number, at + shift + 1
    raise ValueError(f"its byte {at} is damaged")
